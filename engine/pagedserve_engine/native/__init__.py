"""Kernels in C++ for a CPU: compiled when the engine is installed, called through ctypes."""
