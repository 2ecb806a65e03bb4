"""The decoder's arithmetic in C++, for CPUs: built on this machine, for it, once. It knows nothing of files or text."""
