"""A study whose images change while it runs: it ends with one sentence, and goes on once they are put back."""

from __future__ import annotations

import json

import pytest
from studies import SMALL, finish, start, wait_for


@pytest.mark.slow
@pytest.mark.ray
def test_an_image_that_changes_ends_the_study_and_it_goes_on_when_that_is_put_back(tmp_path) -> None:
    process = start(tmp_path, "--trials", "6", "--lanes", "1", "--scheduler", "none", *SMALL)
    seen = "".join(wait_for(process, "[1/6]"))
    folder = tmp_path / "results" / "s"
    image = json.loads((folder / "splits.json").read_text())["train"][0]["image"]
    with open(image, "rb") as file:
        content = file.read()
    with open(image, "wb") as file:
        file.write(content + b"more")
    ended = finish(process, tmp_path)
    assert "Traceback" not in seen + ended.out + ended.err
    sentence = f"Ended because {image} must stay as the study was begun with, but has changed"
    assert sentence in ended.out
    trials = json.loads((folder / "study.json").read_text())["trials"]
    assert {trial["state"] for trial in trials} == {"COMPLETE", "INTERRUPTED"}, trials
    with open(image, "wb") as file:
        file.write(content)
    again = finish(start(tmp_path, "--resume", "s", name=""), tmp_path)
    assert again.code == 0, again.out + again.err
    trials = json.loads((folder / "study.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 6
