"""The operator: an InferenceService becomes a sized, rolled out, autoscaled engine."""

__version__ = "0.1.0"
