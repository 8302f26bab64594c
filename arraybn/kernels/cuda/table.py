"""The constants that cut the work and choose among the ways, with the figure that chose each of them.

Figures are µs on an NVIDIA H200, from sweeps that changed one constant at a time, or from sketches; a constant without
a figure has not been varied. ``python -m arraybn bench --device cuda --tune`` tries other values on any GPU. exact.py
has the constants of exact mode.
"""

from __future__ import annotations

# ---- A block ---------------------------------------------------------------------------------------------------------

WARP = 32
MOST_THREADS = 256  # as in values.cuh
THREADS = MOST_THREADS  # threads at most in a block that has a part of a channel; with 128 a map took 66.4, not 63.7
# Threads at most in a block that has a channel of its own. Evaluation with 256 and 128: (32,2048,7,7) float32 17.6 and
# 16.5, float16 15.7 and 14.0; (32,1024,14,14) 22.2 and 21.8, 15.2 and 14.8. Sums and map: 31.7 and 26.2, 30.3 and 24.4;
# 30.9 and 29.3, 24.3 and 22.0; backward the same but for (32,1024,14,14) float32, 41.5 and 42.7.
ALONE = 128
ROOM = 2**12 + 2**10  # bytes of shared memory of a block beside the values: for the sums, and for the system
UNDER_WAY = 4  # loads that a thread has in flight
WIDTHS = {2: (8, 4, 1), 4: (4, 1), 8: (2, 1)}  # values loaded at once, by the bytes of a value

# ---- Sweeps over planes ----------------------------------------------------------------------------------------------

# Bytes of one channel of x that a block sums, about. (32,64,112,112) float32, sums and map: 100.2, with 2¹⁵ 99.4, with
# 2¹⁷ 103.1; float16 57.0, 57.9 and 51.3.
PART = 2**16
MAP_PART = 2**14  # bytes of one channel that a block maps; (32,64,112,112) float32: 58.6, with 2¹⁶ 63.7
MIN_BLOCK_BYTES = 2**14  # bytes that a block reads at least
BLOCKS = 528  # blocks that keep a large GPU busy: four on each of 132 multiprocessors

# ---- Whole rows, and the ring ----------------------------------------------------------------------------------------

# Bytes of whole rows of each input that a block takes at a time, and chunks that are on their way into shared memory,
# by the number of inputs. A sketch, forward and backward, float32: (32,64,112,112) 83.5 and 126.7; with
# 16 KiB in 8 and 4 stages the same, in 12 and 6 stages 84.8 and 128.1; (32,1024,14,14) 25.0 and 39.1, with 16 KiB in
# 8 and 4 stages 25.3 and 39.5. Three inputs are not measured.
CHUNK = 2**15
STAGES = {1: 6, 2: 3, 3: 2}
MOST_ROWS = 32  # rows of a chunk that a thread adds up at most: half precision is summed in float32 within a chunk
# Bytes of a value for which maps of channels-first data take the ring unasked. Not measured there. The sketch's map of
# channels-last data, (32,64,112,112) float32 55.8, float16 29.1; the present maps of channels-first 58.6 and 32.8.
RING_MAPS: tuple[int, ...] = ()
COEFFICIENTS = {1: 4, 2: 6, 3: 9}  # of a channel in such a map, by the number of inputs; each of 4 or 8 bytes

# ---- Resident blocks -------------------------------------------------------------------------------------------------

ROWS_KEPT = (64, 32)  # bytes side by side that a resident block takes of a row: memory is read in pieces of 32
SINGLE_BLOCK_BYTES = 2**16  # bytes that one block reads in the time that a second launch takes to start
ITEMS = 16  # items of each thread of a resident block; 8 or 32 change a time by up to 8 %, either way
# Bytes of a row that a thread of a resident block takes at once, by the bytes of a value. 8 against 16: float32
# (32,1024,14,14) 36.6 and 28.2, backward of (32,2048,7,7) 27.4 and 21.6; float16 is slower with 16.
SIDES = {2: 8, 4: 16, 8: 8}

# ---- Clusters --------------------------------------------------------------------------------------------------------

# Clusters, by a sketch of the forward, beside the best other way: (32,256,56,56) float32 65.0 (2 blocks) and 94;
# (32,64,112,112) float32 79.0 (8) and 89, float16 46.7 (4) and 55; (32,256,56,56) float16 36.5 (1) and 39.
# Where two resident blocks fit they are the better way: (32,512,28,28) float32 39.8 (1) and 37.1. More blocks than the
# channel needs are slower: (32,256,56,56) float32 81.8 (4). Backward and float64 are not measured.
CLUSTERS = (1, 2, 4, 8, 16)  # blocks, the fewest that a channel fits into
UNASKED = 8  # blocks of a cluster that is taken unasked, at most; 16 are not measured
IN_CLUSTERS: dict[int, tuple[int, ...]] = {1: (2, 4), 2: ()}  # bytes of a value, by the number of inputs
WARPS = 16  # in a block; with 8 warps of 8 pieces (32,256,56,56) float32 takes 67.2
SIDE_WARPS = 4  # in a block with channels side by side; not measured
PIECES = 4  # of a warp; with 8 (32,256,56,56) float32 takes 76.4
# Clusters asked for, as multiples of those for which there are multiprocessors. (32,64,112,112) float32, 8 blocks: 79.0
# by 32 clusters and 88.3 by 16; float16, 4 blocks: 46.7 by 66 and 51.6 by 33; (32,256,56,56) float32, 2 blocks: 65.0
# by 66 and 67.2 by 132.
WAVES = {1: 1, 2: 1, 4: 2, 8: 2, 16: 2}  # of 16 blocks: not measured

# ---- The pipeline ----------------------------------------------------------------------------------------------------

TASK = 3 * 2**14  # bytes that a task of the pipeline reads, about; twice as many: float16 53.7, not 54.5
DRAWING = 3  # blocks on each multiprocessor that draw tasks; 4 change a time by 1 to 2 %
ROUNDS = {1: 4, 2: 2}  # rounds of loads that fit into a block of the pipeline, by the number of inputs
L2_FRACTION = 0.6  # fraction of the L2 cache in which values are found again
