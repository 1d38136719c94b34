"""From video to sound: the generator, its requests and outputs, folders of many inputs, and sweeps of samplers."""
