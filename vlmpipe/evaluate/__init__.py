"""What a model is worth: metrics, the tasks that feed them, and the gate that decides."""
