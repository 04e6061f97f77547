"""Where the kernels find what: int64 arrays of counts and addresses, by index.

Kept apart from the kernels so that a process that only runs them does not import numba.
"""

# The table that every call is given. CONTROL: see below; MODEL: the model's table; JOB: the
# pass to be computed. The others are buffers: X float32 [n, D], the residual; WIDE float32
# [n, widest], what a product gives; ATTENDED float32 [n, D]; LEVELS int8, STEPS float32 and
# SUMS int32, activations as `tile` takes them, of two matrices; SCORES float32 [threads,
# positions]; CLAIMS: see below.
CONTROL, MODEL, JOB, RESIDUAL, PRODUCT, ATTENDED, LEVELS, SCALES, SUMS, SCORES, CLAIMS, TABLE = (
    range(12)
)

# Shared by the threads, each in a cache line of its own: the number of the job, whether one is
# coming, the barriers
# passed so far, whether to stop, the barriers passed when the job began, the threads, the C
# function that gives the core to another thread, and per thread whether it sleeps.
LINE = 8  # int64s
EPOCH, COMING, BARRIER, STOP, BASE, THREADS, YIELD, SLEEPERS = (LINE * i for i in range(8))

# How many pieces of what the threads do together have been claimed: in a layer, of the four
# products and of the heads; QKV of the layer behind the last is the LM head.
QKV, HEAD, OUT, FC, MLP, CLAIM = range(6)

# The model: its shape, then addresses.
(
    LAYERS,
    HEADS,
    HEAD_SIZE,
    WIDTH,
    POSITIONS,
    ACTIVATION,
    EPSILON,
    POSITION_TABLE,
    FINAL_WEIGHT,
    FINAL_BIAS,
    EMBEDDING,
) = range(11)

# A matrix.
LEVEL, SCALE, ZERO, BIAS, BLOCKS, SIZE, BITS, PANELS, MATRIX = range(9)
LM_HEAD = EMBEDDING + MATRIX
FIRST_LAYER = LM_HEAD + MATRIX

# A layer: two normalisations and four matrices.
NORM_1, NORM_1_BIAS, NORM_2, NORM_2_BIAS, C_ATTN = range(5)
C_PROJ, C_FC, MLP_PROJ = (C_ATTN + MATRIX * i for i in (1, 2, 3))
LAYER = C_ATTN + 4 * MATRIX

# A pass: some new tokens of some answers. IDS and PLACES int64 [n]: tokens and their positions;
# STARTS int64 [answers]: tokens before; WANTED int64 [k], ascending: those behind which logits
# are asked for. PARTS: see below. CACHE float16 [2 · layers, CACHE_ROWS, heads, positions,
# head]; LOGITS float32 [k, padded vocabulary].
(TOKENS, IDS, PLACES, LAST, WANTED, ANSWERS, STARTS, PARTS, CACHE, CACHE_ROWS, LOGITS, PASS) = (
    range(12)
)

# An answer's part of a pass: its row of the cache, which of the pass's tokens is its first,
# how many it has, and of how many logits are wanted, the first of them being which of all.
ROW, FIRST, NEW, KEPT, FIRST_KEPT, PART = range(6)

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", "tanh")
