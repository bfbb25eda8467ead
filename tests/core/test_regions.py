import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vilavt_core.errors import ImageError, RegionError
from vilavt_core.protocol import Region, ToolCall
from vilavt_core.regions import MIN_PIXELS, Gallery, fit, share_budget, smart_resize, token_count

TRAINING = 200_704
FULL = 6_422_528


def call(*regions, query="q") -> ToolCall:
    return ToolCall(tuple(Region(index, tuple(box)) for index, box in regions), query)


def gallery(size, max_pixels=TRAINING) -> Gallery:
    images = Gallery()
    images.add_original(Image.new("RGB", size), max_pixels)
    return images


@pytest.mark.parametrize(
    ("height", "width", "max_pixels", "shown"),
    [
        (1080, 1920, FULL, (1092, 1932)),
        (1080, 1920, TRAINING, (336, 588)),
        (480, 640, TRAINING, (364, 504)),
        (2160, 3840, FULL, (1876, 3360)),
        (4320, 7680, FULL, (1876, 3360)),
        (30, 30, FULL, (56, 56)),
        (10, 1000, FULL, (28, 1008)),
        (968, 1296, TRAINING, (364, 504)),
        (968, 1296, 802_816, (756, 1036)),
        (42, 14, TRAINING, (112, 56)),
    ],
)
def test_shown_sizes_are_those_of_the_published_rule(height, width, max_pixels, shown):
    assert smart_resize(height, width, min_pixels=3136, max_pixels=max_pixels) == shown


GOLDEN_CROPS = [
    (
        (1920, 1080),
        TRAINING,
        TRAINING,
        [[(0, [100, 50, 300, 200])]],
        [((392, 308), (0.170068, 0.148810, 0.510204, 0.595238))],
    ),
    (
        (1920, 1080),
        TRAINING,
        TRAINING,
        [[(0, [100, 50, 300, 200])], [(1, [10, 10, 150, 120])]],
        [
            ((392, 308), (0.170068, 0.148810, 0.510204, 0.595238)),
            ((280, 196), (0.178745, 0.163304, 0.300222, 0.322743)),
        ],
    ),
    ((640, 480), TRAINING, TRAINING, [[(0, [0, 0, 252, 196])]], [((504, 392), (0, 0, 0.5, 0.538462))]),
    (
        (3840, 2160),
        FULL,
        FULL,
        [[(0, [1000, 1000, 1200, 1100])]],
        [((392, 196), (0.297619, 0.533049, 0.357143, 0.586354))],
    ),
    ((3840, 2160), FULL, FULL, [[(0, [0, 0, 3332, 1876])]], [((3360, 1904), (0, 0, 0.991667, 1))]),
    (
        (1296, 968),
        802_816,
        FULL,
        [[(0, [100, 100, 300, 300]), (0, [0, 0, 50, 50])]],
        [((392, 420), (0.096525, 0.132275, 0.289575, 0.396825)), ((112, 112), (0, 0, 0.048263, 0.066138))],
    ),
]


@pytest.mark.parametrize(("size", "cap", "crop_cap", "calls", "expected"), GOLDEN_CROPS)
def test_crops_have_the_published_sizes_and_stored_regions(size, cap, crop_cap, calls, expected):
    images = gallery(size, cap)
    views = [view for regions in calls for view in images.crop(call(*regions), crop_cap)]
    assert [view.image.size for view in views] == [shown for shown, _ in expected]
    for view, (_, region) in zip(views, expected, strict=True):
        assert view.region == pytest.approx(region, abs=5e-7)


REFUSED = {
    "no width": (0, [10, 10, 10, 20]),
    "no height": (0, [10, 10, 20, 10]),
    "swapped": (0, [30, 10, 20, 20]),
    "index past the end": (1, [10, 10, 20, 20]),
    "huge index": (10**30, [10, 10, 20, 20]),
    "negative index": (-1, [10, 10, 20, 20]),
    "left of the image": (0, [-1, 10, 20, 20]),
    "right of the image": (0, [10, 10, 505, 20]),
    "above the image": (0, [10, -0.5, 20, 20]),
    "below the image": (0, [10, 10, 20, 364.5]),
    "narrower than a pixel": (0, [101, 10, 101.4, 20]),
    "too long a strip": (0, [0, 100, 504, 102]),
    "not a number": (0, [float("nan"), 10, 20, 20]),
    "infinite": (0, [0, 10, float("inf"), 20]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_region_that_cannot_be_cropped_is_refused_and_named(name):
    images = gallery((640, 480))
    with pytest.raises(RegionError, match=r"^region 1\b") as error:
        images.crop(call((0, [0, 0, 100, 100]), REFUSED[name]), TRAINING)
    assert error.value.region == 1


def test_one_bad_region_discards_the_whole_call():
    images = gallery((640, 480))
    with pytest.raises(RegionError):
        images.crop(call((0, [0, 0, 100, 100]), (5, [0, 0, 1, 1])), TRAINING)
    assert len(images) == 1


def test_a_call_cannot_name_a_crop_it_is_about_to_make():
    images = gallery((640, 480))
    with pytest.raises(RegionError, match="images 0 to 0 were shown"):
        images.crop(call((0, [0, 0, 100, 100]), (1, [0, 0, 10, 10])), TRAINING)


def test_a_box_may_touch_every_edge_of_its_image():
    view = gallery((640, 480)).crop(call((0, [0, 0, 504, 364])), TRAINING)[0]
    assert view.region == (0, 0, 1, 1)


def test_lineage_leads_through_nested_crops_to_the_source():
    images = gallery((1920, 1080))
    images.add_original(Image.new("RGB", (640, 480)), TRAINING)
    images.crop(call((0, [100, 50, 300, 200]), (1, [0, 0, 100, 100])), TRAINING)
    images.crop(call((2, [10, 10, 150, 120])), TRAINING)
    assert images.lineage(4) == (4, 2, 0)
    assert images.lineage(3) == (3, 1)
    assert [view.source for view in images.views] == [0, 1, 0, 1, 0]
    assert images.source_box(4) == (343, 176, 576, 348)
    assert images.views[4].box == (10, 10, 150, 120)


def test_a_nested_crop_shows_the_pixels_of_the_source_not_of_the_crop():
    source = Image.effect_noise((1600, 1600), 80).convert("RGB")
    images = Gallery()
    images.add_original(source, 56 * 56)
    images.crop(call((0, [0, 0, 28, 28])), FULL)
    side = images.views[1].image.width
    view = images.crop(call((1, [0, 0, side / 2, side / 2])), FULL)[0]
    expected = source.crop(images.source_box(2)).resize(view.image.size, Image.Resampling.LANCZOS)
    worst = max(abs(a - b) for a, b in zip(view.image.tobytes(), expected.tobytes(), strict=True))
    assert worst <= 1


def test_zooming_never_magnifies_beyond_twice_nor_beyond_the_source():
    images = gallery((640, 480), FULL)
    assert images.views[0].image.size == (644, 476)
    view = images.crop(call((0, [0, 0, 161, 119])), FULL)[0]
    assert view.image.size == (336, 252)  # 160 x 120 source pixels at 2 x 644/640 are 322 x 241, then the grid of 28
    whole = images.crop(call((0, [0, 0, 644, 476])), FULL)[0]
    assert whole.image.size == (644, 476)


def test_planning_touches_no_pixel_and_adds_nothing():
    images = gallery((640, 480))
    images.sources[0] = type("NoPixels", (), {"width": 640, "height": 480})()
    plan = images.plan(call((0, [0, 0, 252, 196])).regions, TRAINING)[0]
    assert (plan.size, plan.tokens, plan.source_box) == ((504, 392), 252, (0, 0, 320, 258))
    assert len(images) == 1


def test_a_fork_grows_on_its_own():
    images = gallery((640, 480))
    twin = images.fork()
    twin.crop(call((0, [0, 0, 100, 100])), TRAINING)
    assert (len(images), len(twin)) == (1, 2)
    assert twin.sources[0] is images.sources[0]


def test_a_total_budget_is_shared_equally():
    assert share_budget(TRAINING, 3, "total") == TRAINING / 3
    assert share_budget(TRAINING, 3, "per_image") == TRAINING
    assert share_budget(TRAINING, 0, "total") == TRAINING


@pytest.mark.parametrize(("width", "height"), [(1, 201), (1000, 4)])
def test_too_long_a_shape_is_refused_with_its_ratio(width, height):
    with pytest.raises(ImageError, match=str(max(width, height) // min(width, height))):
        smart_resize(height, width)


def test_bounds_that_leave_no_pixel_are_refused():
    with pytest.raises(ImageError, match="raise max_pixels"):
        smart_resize(30, 3000, max_pixels=3136, min_pixels=3136)
    with pytest.raises(ImageError, match="below min_pixels"):
        smart_resize(100, 100, max_pixels=1000)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(MIN_PIXELS, FULL),
)
def test_shown_sizes_are_on_the_grid_and_within_the_budget(height, width, max_pixels):
    try:
        shown_height, shown_width = smart_resize(height, width, max_pixels=max_pixels)
    except ImageError:
        return
    assert shown_height % 28 == 0
    assert shown_width % 28 == 0
    assert shown_height * shown_width <= max(max_pixels, 2 * MIN_PIXELS + 28 * (shown_height + shown_width))


fractions = st.floats(0, 1)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(28, 400), st.integers(28, 400)),
    st.lists(st.tuples(fractions, fractions, fractions, fractions), max_size=3),
)
def test_nested_regions_stay_inside_their_parents(size, boxes):
    images = gallery(size)
    for left, top, right, bottom in boxes:
        parent = images.views[-1]
        width, height = parent.image.size
        box = [min(left, right) * width, min(top, bottom) * height, max(left, right) * width, max(top, bottom) * height]
        try:
            view = images.crop(call((len(images) - 1, box)), TRAINING)[0]
        except RegionError:
            continue
        slack = 1e-9
        assert parent.region[0] - slack <= view.region[0] < view.region[2] <= parent.region[2] + slack
        assert parent.region[1] - slack <= view.region[1] < view.region[3] <= parent.region[3] + slack
        assert view.image.width % 28 == 0
        assert token_count(view.image) == view.tokens


def test_an_image_that_fits_is_not_copied():
    image = Image.new("RGB", (56, 84))
    assert fit(image) is image


@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 200), st.integers(1, 250), st.integers(1, 200)),
        min_size=1,
        max_size=8,
    ),
    max_pixels=st.integers(MIN_PIXELS, 600_000),
    min_pixels=st.sampled_from([784, MIN_PIXELS, 10_000]),
)
@settings(max_examples=150, deadline=None)
def test_crops_fit_together_and_the_largest_ones_make_room(boxes, max_pixels, min_pixels):
    images = Gallery(min_pixels=min_pixels)
    width, height = images.add_original(Image.new("RGB", (1920, 1080)), TRAINING).image.size
    regions = [(0, (x, y, min(x + w, width), min(y + h, height))) for x, y, w, h in boxes]
    try:
        plans = images.plan(call(*regions).regions)
    except RegionError:
        return
    before = [plan.size[0] * plan.size[1] for plan in plans]
    try:
        fitting = images.fit_together(plans, max_pixels)
    except RegionError:
        fitting = None
    if fitting is None:
        assert sum(before) > max_pixels
        return
    after = [plan.size[0] * plan.size[1] for plan in fitting]
    assert sum(after) <= max_pixels
    if sum(before) <= max_pixels:
        assert fitting == plans
    for plan, old, new in zip(fitting, before, after, strict=True):
        assert new <= old
        # an encoder with the same bounds leaves it as it is
        assert smart_resize(plan.size[1], plan.size[0], min_pixels=min_pixels, max_pixels=max(new, min_pixels)) == (
            plan.size[1],
            plan.size[0],
        )
    kept = [old for old, new in zip(before, after, strict=True) if old == new]
    shrunk = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert all(old > size for old, _ in shrunk for size in kept)
    views = images.add_crops(fitting)
    assert [view.image.size for view in views] == [plan.size for plan in fitting]


def test_crops_that_cannot_be_made_small_enough_are_refused_with_both_numbers():
    images = gallery((1920, 1080))
    plans = images.plan(call(*[(0, [0, 0, 100, 100])] * 3).regions)
    total = sum(plan.size[0] * plan.size[1] for plan in plans)
    with pytest.raises(RegionError, match=rf"the 3 regions have {total} pixels together .* at most 3136 are encoded"):
        images.fit_together(plans, 3136)
    assert [plan.size for plan in images.fit_together(plans, 3 * 3136)] == [(56, 56)] * 3
