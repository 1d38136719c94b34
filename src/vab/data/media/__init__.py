"""A file to the sound and the pictures of the same seconds, and back to a file."""
