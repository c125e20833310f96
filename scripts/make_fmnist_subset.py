"""Make the embedded Fashion-MNIST subset: the first 1,000 training and 200 test images of each class.

    python scripts/make_fmnist_subset.py FOLDER vim/data/fmnist_subset.npz

FOLDER holds the four idx files of the full set (`train-images-idx3-ubyte.gz`, ...). The same input gives the same
bytes.
"""

import argparse
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from vim.data.fmnist import read_idx_split

PER_CLASS = {"train": 1000, "test": 200}


def main() -> None:
    """Read the full set, keep the first images of each class in file order, write one archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the full set's idx files")
    parser.add_argument("output", type=Path, help="archive to write (.npz)")
    args = parser.parse_args()
    with zipfile.ZipFile(args.output, "w") as archive:
        for split, per_class in PER_CLASS.items():
            images, labels = read_idx_split(args.folder, split)
            keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
            for name, array in ((f"{split}_images", images[keep]), (f"{split}_labels", labels[keep])):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, array)
                # A fixed date, so that the same input gives the same bytes.
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=(2020, 1, 1, 0, 0, 0))
                archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_LZMA)
    print(f"wrote {args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
