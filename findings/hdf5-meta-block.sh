#!/usr/bin/env bash
# h5py 3.16.0 (HDF5 2.0.0): meta_block_size does not keep metadata at the beginning of a file. Seen 2026-11.
#
# Expected: with h5py.File(..., meta_block_size=65536) the descriptions of the datasets (object headers) lie in the
# first 64 KiB, so that a hash of those bytes covers them.
# Seen: it is the size of one block. When it is full the next block is taken wherever the file ends at that time, which
# is behind the rows written so far: with 200 small contiguous datasets 21 headers lie among the rows. With a block of
# enough size all lie before the first row; there is no error or warning where it is too small.
#
# Printed: block size, datasets; where the first rows begin; headers that lie behind them; the last header; file size.
# Output seen:
#   h5py 3.16.0 HDF5 2.0.0
#   block 65536, 5 datasets: rows from 65536, 0 headers behind, the last at 2216 of 353536
#   block 65536, 201 datasets: rows from 65536, 21 headers behind, the last at 1710464 of 1987072
#   block 65536, 801 datasets: rows from 65536, 621 headers behind, the last at 6179816 of 6983680
#   block 1048576, 801 datasets: rows from 1048576, 0 headers behind, the last at 307224 of 7704576
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet h5py==3.16.0
"$work/venv/bin/python" - "$work" <<'EOF'
import sys

import h5py

print("h5py", h5py.__version__, "HDF5", h5py.version.hdf5_version)
behind = {}
for block, columns in ((65536, 4), (65536, 200), (65536, 800), (2**20, 800)):
    path = f"{sys.argv[1]}/{block}-{columns}.h5"
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_layout(h5py.h5d.CONTIGUOUS)
    how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    with h5py.File(path, "w", meta_block_size=block) as file:
        file.create_dataset("rows", (1000, 64), "f4", dcpl=how.copy())
        for i in range(columns):
            file.create_dataset(f"label_{i}", (1000,), "i8", dcpl=how.copy())
        for item in file.values():
            item[...] = 1
    with h5py.File(path) as file:
        headers = [h5py.h5o.get_info(item.id).addr for item in file.values()]
        first = min(item.id.get_offset() for item in file.values())
        behind[block, columns] = sum(address > first for address in headers)
        print(f"block {block}, {columns + 1} datasets: rows from {first}, {behind[block, columns]} headers behind, "
              f"the last at {max(headers)} of {file.id.get_filesize()}")
few, many, most, roomy = behind.values()
if few or not many or not most or roomy:
    sys.exit("behaviour has changed: where HDF5 puts object headers")
EOF
