"""Offsets of fields in the int64 tables of counts and addresses that are passed to kernels.

Kept apart from the kernels so that a process that only runs them does not import numba.
"""

# The table of every call. CONTROL: see below; MODEL: the model's table; JOB: the pass to be
# computed. The others are buffers, n the new tokens of a pass: RESIDUAL float32 [n, width];
# PRODUCT float32 [n, widest], results of products; GATED float32 [n, inner], of gated
# feed-forward layers; ATTENDED float32 [n, the wider of residual and attention]; LEVELS int8,
# SCALES float32 and SUMS int32, activations as `tile` takes them, of two matrices; SCORES
# float32 [threads, QUERIES, positions]; LOW float32 [n, RANKS], rows times the first factors of
# adapters; CLAIMS: see below.
QUERIES = 4  # of a head, computed together
(
    CONTROL,
    MODEL,
    JOB,
    RESIDUAL,
    PRODUCT,
    GATED,
    ATTENDED,
    LEVELS,
    SCALES,
    SUMS,
    SCORES,
    LOW,
    CLAIMS,
    TABLE,
) = range(14)

# Shared by the threads, each in a cache line of its own: the number of the job, whether one is
# coming, the barriers passed so far, whether to stop, the barriers passed when the job began,
# the threads, the C function that yields the core, and per thread whether it sleeps.
LINE = 8  # int64s
EPOCH, COMING, BARRIER, STOP, BASE, THREADS, YIELD, SLEEPERS = (LINE * i for i in range(8))

# Pieces of the shared work of a layer that have been claimed: of its four products and of
# attention's heads; QKV of the layer after the last is the LM head.
QKV, HEAD, OUT, UP, DOWN, CLAIM = range(6)

# The model: its shape, then addresses. POSITIONS is a multiple of 16. POSITION_TABLE: float32
# [positions, width] learned embeddings, or [positions, head width] rotary cosines, then sines,
# of each position.
(
    LAYERS,
    HEADS,
    KV_HEADS,
    HEAD_WIDTH,
    WIDTH,
    POSITIONS,
    ACTIVATION,
    EPSILON,
    POSITION_TABLE,
    FINAL_WEIGHT,
    FINAL_BIAS,
    EMBEDDING,
) = range(12)

# A matrix.
LEVEL, SCALE, ZERO, BIAS, BLOCKS, SIZE, BITS, PANELS, MATRIX = range(9)
LM_HEAD = EMBEDDING + MATRIX
FIRST_LAYER = LM_HEAD + MATRIX

# A layer: two normalisations (no biases for RMS) and four matrices.
NORM_1, NORM_1_BIAS, NORM_2, NORM_2_BIAS, LAYER_QKV = range(5)
LAYER_OUT, LAYER_UP, LAYER_DOWN = (LAYER_QKV + MATRIX * i for i in (1, 2, 3))
LAYER = LAYER_QKV + 4 * MATRIX

# A pass: some new tokens of some answers. IDS and PLACES int64 [n]: tokens and their positions;
# STARTS int64 [answers]: tokens before; WANTED int64 [k], ascending: those after which logits
# are asked for. PARTS: see below. CACHE float16 [2 · layers, CACHE_ROWS, kv heads, positions,
# head width], of keys [.., positions / 16, head width, 16]; LOGITS float32 [k, padded
# vocabulary]. CHANGES int64 [n + k]: the adapter's table of each new token and of each of those
# that logits are wanted of, 0 for none; itself 0 where none has one. RANKS: of LOW.
(
    TOKENS,
    IDS,
    PLACES,
    LAST,
    WANTED,
    ANSWERS,
    STARTS,
    PARTS,
    CACHE,
    CACHE_ROWS,
    LOGITS,
    CHANGES,
    RANKS,
    PASS,
) = range(14)

# An adapter's table: of each layer its four matrices, of each INPUTS, RANK (a multiple of 16; 0
# where it is left as it is) and the factors FIRST_FACTOR float16 [rank / 16, inputs, 16] and
# SECOND_FACTOR float16 [panels, rank, 16].
INPUTS, RANK, FIRST_FACTOR, SECOND_FACTOR, CHANGE = range(5)
CHANGED_QKV, CHANGED_OUT, CHANGED_UP, CHANGED_DOWN, CHANGED = range(5)

# An answer's part of a pass: its row of the cache, the index of its first token in the pass,
# its number of tokens, the number of its logits that are wanted, and the index of the first of
# them among all that are wanted.
ROW, FIRST, NEW, KEPT, FIRST_KEPT, PART = range(6)
