"""Device kernels that several layers share; nothing here is imported where there is no Triton."""
