"""SECURITY.md has the limits that the code has, and is found."""

from pathlib import Path

from vilavt_core.download import UrlPolicy
from vilavt_core.images import ImageLimits
from vilavt_core.json_text import MAX_DEPTH
from vilavt_core.state import MAX_BYTES, MAX_CHARACTERS
from vilavt_core.video import VideoLimits
from vilavt_vllm.server.options import ServerOptions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_page_has_the_limits_of_the_code():
    image, video, url, server = ImageLimits(), VideoLimits(), UrlPolicy(), ServerOptions()
    assert (server.max_image_bytes, server.max_image_pixels) == (image.max_bytes, image.max_pixels)
    for line in (
        f"| an image | {image.max_bytes:,} bytes, {image.max_pixels:,} pixels |",
        f"| a video, locally | {video.max_bytes:,} bytes, {video.max_frames:,} frames, {video.max_pixels:,} pixels a "
        f"frame, {video.max_total_pixels:,} pixels together, {video.max_seconds:.0f} s |",
        f"| a video of a request | {server.max_video_bytes:,} bytes, {server.max_video_pixels:,} pixels together, "
        f"{server.max_video_seconds:.0f} s |",
        f"| a URL | {url.timeout:.0f} s an operation, {url.total_timeout:.0f} s together, {url.max_redirects} redirects"
        " |",
        f"| a request | {server.max_body_bytes:,} bytes, {server.max_request_pixels:,} pixels |",
        f"| all running requests | {server.max_episodes}, {server.max_picture_memory:,} bytes of images |",
        f"| kept conversations | {server.max_conversations}, {server.max_conversation_bytes:,} bytes of images |",
        f"| a conversation's state | {MAX_CHARACTERS:,} characters, {MAX_BYTES:,} bytes inflated |",
        f"| JSON out of files | nested {MAX_DEPTH} deep |",
    ):
        assert line in PAGE


def test_the_page_is_linked_to():
    for page in ("README.md", "docs/README.md", "vilavt_vllm/README.md"):
        assert "SECURITY.md" in (ROOT / page).read_text(encoding="utf-8")
