"""The decoder's arithmetic in C++, for CPUs. Knows nothing of files or text."""
