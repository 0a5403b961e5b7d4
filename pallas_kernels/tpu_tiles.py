"""The tiles in which TPU kernels go through a tensor."""

SIZE = 256  # elements in a block: two registers' lanes, one for each half of a byte's codes
ROWS = 128  # rows of the tensor in a tile
BLOCKS = 8  # blocks of a row in a tile
