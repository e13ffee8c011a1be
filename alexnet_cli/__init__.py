"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) as a command-line toolkit."""

__version__ = "0.1.0"
