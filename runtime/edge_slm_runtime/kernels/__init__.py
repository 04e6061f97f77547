"""GPT-2 as machine code for the processor at hand, compiled once by numba and kept.

`gpt2` and what it imports is compiled, and needs numba; `tables` says how memory is handed
to it, `image` and `compiled` bring the code into a process, with numba only when there is
none yet.
"""
