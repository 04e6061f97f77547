"""GPT-2 as machine code for the processor at hand, compiled once by numba and kept.

`tile`, `native` and `gpt2` are what is compiled, and import numba; `tables` says how memory
is handed to it, and `compiled` brings the code into a process, with numba only when there
is none yet.
"""
