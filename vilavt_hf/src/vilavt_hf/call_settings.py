"""The keyword arguments of a processor's call, sorted by who uses them, as stock processors of transformers take them:
flat, or in ``text_kwargs``, ``images_kwargs`` and ``common_kwargs``.

Stock versions differ in what they drop in silence; here every argument is used, or is an error that names it.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from vilavt_core.errors import ProcessorError

from . import compat

OF_TEXT = compat.TEXT_SETTINGS | {"return_tensors", "return_mm_token_type_ids", "return_text_replacement_offsets"}
"""What the tokenizer uses, and what the processor does with its tokens."""
OF_IMAGES = frozenset(
    {
        "do_convert_rgb",
        "do_normalize",
        "do_rescale",
        "do_resize",
        "image_mean",
        "image_std",
        "input_data_format",
        "max_pixels",
        "merge_size",
        "min_pixels",
        "patch_size",
        "resample",
        "rescale_factor",
        "return_tensors",
        "size",
        "temporal_patch_size",
    }
)
"""What the image processor uses. Not what all image processors take and this one ignores, such as ``crop_size``."""
_GROUPS = {"text_kwargs": OF_TEXT, "images_kwargs": OF_IMAGES}
_UNUSED_GROUPS = ("videos_kwargs", "audio_kwargs")
FLAT = OF_TEXT | OF_IMAGES
GROUPS = frozenset({*_GROUPS, *_UNUSED_GROUPS, "common_kwargs"})


def sort_settings(given: Mapping[str, Any], tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings for the text and for the images of one call; one that is None is left out.

    Precedence, from the lowest: what the tokenizer was made with, ``common_kwargs``, what was given by name.

    Raises:
        ProcessorError: an argument is unknown, or was passed two times.
    """
    common = _mapping(given, "common_kwargs")
    check_known(common, FLAT, "common_kwargs: ")
    for name in _UNUSED_GROUPS:
        if _mapping(given, name):
            raise ProcessorError(f"{name}: ViLaVT takes neither videos nor audio; leave it out, send frames as images")
    flat = {name: value for name, value in given.items() if name not in GROUPS}
    check_known(flat, FLAT)
    found = []
    for group, known in _GROUPS.items():
        nested = _mapping(given, group)
        check_known(nested, known, f"{group}: ")
        if twice := sorted(set(nested) & set(flat)):
            raise ProcessorError(
                f"{', '.join(twice)} was passed two times: in {group} and as a keyword argument; leave one out"
            )
        of_group = {**common, **flat}
        settings = {name: value for name, value in of_group.items() if name in known} | nested
        found.append({name: value for name, value in settings.items() if value is not None})
    text, images = found
    made_with = {name: value for name, value in tokenizer.init_kwargs.items() if name in compat.TEXT_SETTINGS}
    return {name: getattr(tokenizer, name, value) for name, value in made_with.items()} | text, images


def bounds_within(settings: dict[str, Any], size: Mapping[str, int]) -> dict[str, Any]:
    """Image settings with the bounds on an image's area under the one name, ``size``, that every version uses.

    Args:
        settings: of the call.
        size: of the image processor.

    Raises:
        ProcessorError: two bounds contradict one another, or `size` is no such bound.
    """
    settings = dict(settings)
    named = {key: settings.pop(key) for key in ("min_pixels", "max_pixels") if key in settings}
    own = settings.pop("size", None)
    if own is not None and named:
        raise ProcessorError(f"size and {', '.join(named)} say the same in two ways; leave one out")
    if own is None and not named:
        return settings
    if own is not None and not (isinstance(own, Mapping) and set(own) == {"shortest_edge", "longest_edge"}):
        raise ProcessorError(
            f"size={own!r} must be {{'shortest_edge': …, 'longest_edge': …}}, the least and the most pixels of an image"
        )
    bounds = dict(own or size)
    low = named.get("min_pixels", bounds["shortest_edge"])
    high = named.get("max_pixels", bounds["longest_edge"])
    for name, value in (("min_pixels", low), ("max_pixels", high)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ProcessorError(f"{name}={value!r} must be a number of pixels, 1 or more")
    if low > high:
        raise ProcessorError(f"an image cannot have at least {low} and at most {high} pixels; give both bounds")
    return {**settings, "size": {"shortest_edge": low, "longest_edge": high}}


def check_known(given: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Stop at names that nobody uses.

    Raises:
        ProcessorError: names them, and what was meant or may be given.
    """
    names = sorted(known)
    unknown = sorted(set(given) - set(names))
    if unknown:
        meant = sorted({match for name in unknown for match in difflib.get_close_matches(name, names, 1)})
        hint = f"did you mean {', '.join(meant)}? It" if meant else "it"
        raise ProcessorError(
            f"{where}the processor does not support {', '.join(unknown)}; {hint} takes {', '.join(names)}"
        )


def _mapping(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ProcessorError(f"{name} is a {type(value).__name__}, it must be a dict of settings")
    return dict(value or {})
