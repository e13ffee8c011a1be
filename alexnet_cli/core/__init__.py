"""The two-tower core: data, network, training, evaluation. torch is imported in here and nowhere else."""
