"""The commands of `alexnet`: one module a command, found through the entry points `alexnet.commands`."""
