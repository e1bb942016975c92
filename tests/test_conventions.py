"""What everything else leans on: files that are whole, hashes that name a case."""
import numpy as np
import pytest

from kit import files, slices


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    """A write that fails half-way leaves what was there, and no litter."""
    path = tmp_path / "a" / "file.txt"
    files.replace_file(path, lambda p: p.write_text("old"))

    def broken(p):
        p.write_text("ne")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        files.replace_file(path, broken)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_hashes_name_a_label_map_and_an_outline():
    """The same labels give the same hash whatever their dtype, and any changed voxel, axis order or
    shape another; maps without tumour, all alike, go by the brain's outline."""
    labels, brain = np.arange(24).reshape(2, 3, 4) % 4, np.ones((2, 3, 4), bool)
    of_labels, of_brain = slices.case_hashes(labels.astype(np.uint8), brain)
    assert slices.case_hashes(labels.astype(np.float32), brain) == (of_labels, of_brain)
    assert of_labels != of_brain
    assert slices.case_hashes(np.asfortranarray(labels), brain)[0] == of_labels
    other, narrow = labels.copy(), brain.copy()
    other[1, 2, 3], narrow[0, 0, 0] = (other[1, 2, 3] + 1) % 4, False
    for changed in (other, labels.reshape(3, 2, 4)):
        assert slices.case_hashes(changed, brain)[0] != of_labels
    of_narrow = slices.case_hashes(labels * 0, narrow)[0]
    assert slices.case_hashes(labels, narrow) == (of_labels, of_narrow) != (of_labels, of_brain)
