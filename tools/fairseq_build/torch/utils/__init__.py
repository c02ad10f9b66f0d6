"""See cpp_extension.py."""
