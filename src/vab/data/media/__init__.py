"""Read the sound and the pictures of the same seconds from media files, and write such files."""
