"""Episodes of rows: what a row may change, and which rows have a first turn that fits."""

import logging

import pytest
from PIL import Image

from vilavt_core.driver import ConversationSettings
from vilavt_rl.data import Row
from vilavt_rl.errors import RolloutError, RowError
from vilavt_rl.rollout import first_turn_fits, fitting_rows, settings_of_checkpoint, start_row

RUN = 30 * 784  # pixels, below what the image processor allows


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A landscape whose EXIF data says that it is a portrait."""
    path = tmp_path_factory.mktemp("pictures") / "picture.jpg"
    image = Image.new("RGB", (1200, 500))
    image.getexif()[0x0112] = 6
    image.save(path, exif=image.getexif())
    return str(path)


@pytest.fixture(scope="module")
def settings(processor, tmp_path_factory: pytest.TempPathFactory) -> ConversationSettings:
    folder = tmp_path_factory.mktemp("checkpoint")
    return settings_of_checkpoint(folder, processor, limits={"max_pixels": RUN, "crop_max_pixels": 20 * 784})


def row(picture: str, **changes) -> Row:
    return Row(**{"question": "Which?", "answer": "A", "images": (picture,), "question_type": "judgment", **changes})


def start(settings: ConversationSettings, one: Row, max_prompt: int = 10_000):
    return start_row(one, settings, max_prompt=max_prompt, max_response=500).episode


def test_a_row_lowers_the_pixels_of_the_run_and_cannot_raise_them(settings: ConversationSettings, picture: str) -> None:
    asked = (None, 10 * 784, 25 * 784, 60 * 784)
    limits = [start(settings, row(picture, max_pixels=pixels)).limits for pixels in asked]
    assert [found.max_pixels for found in limits] == [30 * 784, 10 * 784, 25 * 784, 30 * 784]
    assert [found.crop_max_pixels for found in limits] == [20 * 784, 10 * 784, 20 * 784, 20 * 784]


def test_a_rows_turns_win_over_those_of_the_run(settings: ConversationSettings, picture: str) -> None:
    assert [start(settings, row(picture, max_turns=turns)).limits.max_turns for turns in (None, 2, 9)] == [5, 2, 9]


@pytest.mark.parametrize("change", [{}, {"max_pixels": 10 * 784}, {"max_turns": 1}, {"images": ()}])
def test_a_row_fits_exactly_if_its_episode_can_start(
    settings: ConversationSettings, picture: str, change: dict
) -> None:
    one = row(picture, **change)
    length = len(start(settings, one).record.token_ids)
    assert first_turn_fits(one, settings, length)
    start(settings, one, max_prompt=length)
    assert not first_turn_fits(one, settings, length - 1)
    with pytest.raises(RolloutError, match=f"has {length} tokens, at most {length - 1} are allowed"):
        start(settings, one, max_prompt=length - 1)


def test_a_row_with_more_images_than_allowed_does_not_fit(settings: ConversationSettings, picture: str) -> None:
    crowded = row(picture, images=(picture,) * 53)
    assert not first_turn_fits(crowded, settings, 10**6)
    with pytest.raises(RolloutError, match="53 images, at most 52"):
        start(settings, crowded, max_prompt=10**6)


def test_rows_that_do_not_fit_are_counted_in_the_log_and_none_left_is_an_error(
    settings: ConversationSettings, picture: str, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = row(picture), row(picture, question="Why? " * 500)
    length = len(start(settings, short).record.token_ids)
    with caplog.at_level(logging.WARNING):
        assert fitting_rows([short, long, short], settings, length) == [short, short]
    assert "1 of 3 rows are left out" in caplog.text
    with pytest.raises(RowError, match=f"none of 1 rows fits: each first turn has more than {length} tokens"):
        fitting_rows([long], settings, length)
