"""`alexnet train`: train the network of the paper, or one of its variants, on a prepared data set."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Annotated, Literal

import typer

from alexnet_cli import recipe_io
from alexnet_cli.console import Reporter
from alexnet_cli.options import (
    DataOption,
    DevicesOption,
    JobsOption,
    JsonFlag,
    Parallel,
    Precision,
    QuietFlag,
    SettingsOption,
    complete_recipe,
    complete_weights,
)
from alexnet_plugins.train.display import finish, record_errors, run_loop, show_heading, show_start, show_unused_options
from alexnet_plugins.train.setup import (
    check_max_steps,
    check_placement,
    choose_data,
    find_run,
    find_start,
    load_base_recipe,
    merge_saved_options,
    show_config,
)

Cache = Literal["auto", "device", "none"]
Frozen = Literal["none", "conv"]
RECIPE_HELP = (
    "Recipe: paper, krizhevsky, caffe, fast, tiny (for a CPU), or a TOML file [default: paper, or that of --init-from]"
)
FROM_RECIPE = "[default: the recipe's]"


def train(
    data: DataOption = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help=RECIPE_HELP, autocompletion=complete_recipe)] = None,
    settings: SettingsOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help=f"Maximum number of passes over the training set {FROM_RECIPE}")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help=f"Images per step, over all devices {FROM_RECIPE}")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images of a batch to compute at once; fewer need less memory [default: all]"),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help=f"Initial learning rate; the highest one if one-cycle {FROM_RECIPE}")
    ] = None,
    gpus: DevicesOption = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU processes, each acting as a device (with --gpus none)")
    ] = None,
    parallel: Annotated[
        Parallel,
        typer.Option(
            help="How devices share the work: tower (model parallel), data (data parallel), hybrid (data-parallel "
            "convolutions, model-parallel FC layers)"
        ),
    ] = "auto",
    compress: Annotated[
        bool,
        typer.Option("--compress", help="Exchange data-parallel gradients as bf16", show_default=False),
    ] = False,
    precision: Annotated[
        Precision | None, typer.Option(help=f"Precision of convolutions and matrix products {FROM_RECIPE}")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help=f"Random seed (initial weights, data order, augmentation, dropout) {FROM_RECIPE}"),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Run to continue, with its own recipe. Options that change the result are refused, except --set. "
            "With auto: the run of --name, or the newest if unfinished, or else a new one."
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            autocompletion=complete_weights,
            help="Start from these weights (as for -w); layers that do not fit start at random",
        ),
    ] = None,
    freeze: Annotated[Frozen | None, typer.Option(help="Layers to freeze: conv (layers 1 to 5) or none")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run [default: date, time and recipe]")] = None,
    max_time: Annotated[str | None, typer.Option(help="Save and stop after this time, such as 8h or 1h30m")] = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Save a checkpoint every STEPS steps, as well as after each epoch"),
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Number of newest checkpoints to keep, besides the best [default: 1]")
    ] = None,
    jobs: JobsOption = None,
    cache: Annotated[
        Cache,
        typer.Option(help="Keep decoded images on the device: if they easily fit (auto), always, or never"),
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the network with torch.compile")
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Write TensorBoard events to runs/tensorboard/NAME", show_default=False),
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every recipe value with its source, and exit")
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train the two-tower network on a prepared data set.

    Without options: recipe `paper`, the newest prepared data set, the first GPU if there is one. Without a GPU, `paper`
    takes hours on a few thousand images and `--recipe tiny` takes minutes.
    """
    from alexnet_cli.core.signals import catch_stop_signals, parse_duration

    time_limit, overrides = parse_duration(max_time), recipe_io.parse_settings(settings or [])
    if recipe:
        # mistyped keys are reported before torch is loaded
        recipe_io.apply_changes(recipe_io.load_recipe(recipe), overrides)

    from alexnet_cli.core.data.shards import open_dataset
    from alexnet_cli.core.parallel import placement as devices
    from alexnet_cli.core.parallel.process_group import join_process_group, launcher_pid, mesh_shape, read_rank_info
    from alexnet_cli.core.training.fine_tuning import load_source, match_layers
    from alexnet_cli.core.training.loop import TrainingLoop, check_data, open_run
    from alexnet_cli.core.training.resume import check_recipe
    from alexnet_cli.core.training.tensorboard import check_installed
    from alexnet_cli.core.training.trainer import Trainer

    options = {
        "epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "precision": precision, "seed": seed,
        "frozen": freeze,
    }  # fmt: skip
    explicit = {key: value for key, value in options.items() if value is not None}
    if tensorboard:
        check_installed()
    if not print_config and (count := devices.count_processes(gpus, processes)) > 1:
        from alexnet_cli.core.parallel.launch import launch

        requested = recipe_io.apply_changes(recipe_io.load_recipe(recipe or "paper"), {**overrides, **explicit})
        mesh_shape(count, parallel, requested.towers)  # reports what is impossible before processes start
        raise typer.Exit(launch(sys.argv[1:], count))

    with ExitStack() as stack:
        ranks = stack.enter_context(join_process_group(read_rank_info(), devices.choose_backend(gpus)))
        reporter = Reporter("train", json=json, quiet=quiet, speaks=ranks.is_main)

        # The recipe: that of the run, of the weights or of --recipe, changed by --set and by options.
        resumed = find_run(ranks, resume, name)
        initial = load_source(init_from, resumed)
        base, sources = load_base_recipe(recipe, resumed, initial)
        resolved = recipe_io.apply_changes(recipe_io.apply_changes(base, overrides), explicit)
        if print_config:
            sources |= dict.fromkeys(overrides, "--set") | dict.fromkeys(explicit, "option")
            show_config(reporter, resolved, sources)
            return
        if resumed:
            from_file = vars(base).keys() - overrides.keys() - explicit.keys() if recipe else ()
            check_recipe(resumed, resolved, overrides, from_file)
            check_max_steps(resumed, max_steps)

        # The data, the devices and the run.
        data_path, data_note = choose_data(data, resumed)
        dataset = open_dataset(data_path)
        check_data(dataset, resumed)
        transfer = match_layers(init_from, initial, resolved, dataset.classes) if initial else None
        saved_options = merge_saved_options(
            resumed,
            {"save_every": save_every, "keep": keep, "micro_batch": micro_batch, "tensorboard": tensorboard or None},
        )
        stop = stack.enter_context(catch_stop_signals(time_limit, launcher_pid()))
        placement = devices.place_ranks(ranks, gpus, resolved.precision, parallel, resolved.towers)
        check_placement(placement, resolved, len(dataset.split("train")), saved_options["micro_batch"], compile)
        if resumed:
            stack.enter_context(resumed.locked())
        command = ["alexnet", *sys.argv[1:]]
        run = open_run(resumed, name, resolved, placement, dataset, transfer, saved_options, command)
        if not resumed:
            stack.enter_context(run.locked())
        stack.enter_context(record_errors(reporter, run))

        # The training.
        trainer = Trainer.for_dataset(
            resolved, dataset, placement,
            micro_batch=saved_options["micro_batch"], compile=compile, compress=compress,
        )  # fmt: skip
        if transfer:
            transfer = transfer.apply(trainer.network)
        threads = devices.choose_decode_threads(jobs)
        loop = TrainingLoop(trainer, dataset, run, threads, cache, saved_options["keep"] or 1, transfer)
        show_heading(reporter, loop)
        if data_note:
            reporter.line("note", data_note)
        show_unused_options(reporter, trainer, parallel, micro_batch)
        start, damaged = find_start(loop)
        show_start(reporter, loop, start, damaged, max_steps)
        reason = run_loop(
            reporter, loop, start, max_steps, stop,
            saved_options["save_every"] or sys.maxsize, bool(saved_options["tensorboard"]),
        )  # fmt: skip
        if ranks.is_main:
            finish(reporter, loop, reason)
