"""The native CPU library: C++ in `csrc`, behind a C ABI that is called through ctypes."""
