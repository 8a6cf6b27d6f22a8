"""Screenshots of the documentation: reproducible if a browser is installed."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY


def load_script():
    """Return docs/take_screenshots.py as a module."""
    pytest.importorskip("selenium", reason="needs pip install 'collm-dist[docs]'")
    spec = importlib.util.spec_from_file_location("take_screenshots", REPOSITORY / "docs" / "take_screenshots.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    if not any(map(shutil.which, module.BROWSERS)) or not any(map(shutil.which, module.DRIVERS)):
        pytest.skip("needs Chromium and its driver")
    return module


@pytest.fixture
def script():
    return load_script()


@pytest.mark.slow
def test_every_picture_shows_its_page(script, finished_run, tmp_path):
    from PIL import Image

    assert script.main([str(finished_run), "--output", str(tmp_path), "--search", "Film 1"]) == 0
    paths = {path.stem.removeprefix("tensorboard_"): path for path in tmp_path.iterdir()}
    assert set(paths) == {picture.name for picture in script.PICTURES}
    for path in paths.values():
        assert path.stat().st_size < 200_000
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 50, f"{path.name} shows next to nothing"
        orange = (np.abs(pixels.astype(int) - (245, 124, 0)) < 12).all(axis=1)
        assert 0.03 < orange.mean() < 0.3, f"{path.name} has no TensorBoard header"


def test_a_folder_that_is_not_there_is_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path / "none")])
    assert "there is no folder" in capsys.readouterr().err
