"""The CUDA backend: kernels, their compilation at build time, and the operations that launch them.

`kernel_table` says which kernels an engine has, `compile` makes their binaries when an engine is
built, `driver` and `library` bring them onto a GPU, `ops` is the backend. Nothing here is imported
unless an engine for a GPU is built or run.
"""
