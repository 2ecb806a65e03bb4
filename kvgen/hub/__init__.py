"""Find, download and list model files."""
