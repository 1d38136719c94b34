"""What a training run needs, computed before it starts and without the hardware: memory, time, steps, disk."""
