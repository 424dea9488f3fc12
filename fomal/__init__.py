"""fomal: few-shot learners trained with Reptile, first-order MAML and their family, on Lightning."""

__version__ = "0.1.0"
