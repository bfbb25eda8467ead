"""The vision tower a second time, slowly: token by token, segment by segment, after tests/golden/README.md."""

import math

import torch
from torch.nn import functional


def patch_places(grids, merge, side):
    """(image, frame, window row, window column, y, x) of every patch, in the order of the pixels."""
    places = []
    for image, (t, h, w) in enumerate(grids):
        for frame in range(t):
            for by in range(h // merge):
                for bx in range(w // merge):
                    for dy in range(merge):
                        for dx in range(merge):
                            places.append((image, frame, by // side, bx // side, by * merge + dy, bx * merge + dx))
    return places


def slow_tower(tower, pixels, grids, counts, text, mask, seen=None):
    """Plain loops over images, frames and patches; only the weights are shared with the model under test.

    `seen`, a list, gets for every block all attention as (heads, N, N + Q * T): rows and first columns are patches in
    the order of the pixels, the others the columns of the query rows, 0 where nothing is attended to.
    """
    config = tower.config
    merge, heads = config.spatial_merge_size, config.num_heads
    head = config.hidden_size // heads
    side = config.window_size // merge // config.patch_size
    joint, full = config.query_aware_blocks(), config.fullatt_block_indexes
    x = tower.patch_embed(pixels)

    places = patch_places(grids, merge, side)
    group_of = [g for g, count in enumerate(counts) for _ in range(count)]
    offset, offsets, end = 0, [], {}
    for image, (_, h, w) in enumerate(grids):
        if image and group_of[image] != group_of[image - 1]:
            offset = 0
        offsets.append(offset)
        offset += max(h, w)
        end[group_of[image]] = offset

    def rotate(vector, y, z):  # (heads, head) at position (y, z)
        quarter = head // 4
        frequency = [1 / 10000 ** (2 * i / (head // 2)) for i in range(quarter)]
        angle = torch.tensor([y * f for f in frequency] + [z * f for f in frequency])
        angle = torch.cat([angle, angle])
        half = torch.cat([-vector[:, head // 2 :], vector[:, : head // 2]], 1)
        return vector * angle.cos() + half * angle.sin()

    for i, block in enumerate(tower.blocks):
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x)).view(len(x), 3, heads, head).unbind(1)
        q = torch.stack(
            [rotate(q[p], y + offsets[im], z + offsets[im]) for p, (im, _, _, _, y, z) in enumerate(places)]
        )
        k = torch.stack(
            [rotate(k[p], y + offsets[im], z + offsets[im]) for p, (im, _, _, _, y, z) in enumerate(places)]
        )
        if i in joint:
            key = [group_of[place[0]] for place in places]
        elif i in full:
            key = [place[:2] for place in places]
        else:
            key = [place[:4] for place in places]
        out = torch.zeros_like(q)
        attended = torch.zeros(heads, len(x), len(x) + mask.numel())
        for segment in set(key):
            rows = [p for p, own in enumerate(key) if own == segment]
            keys, values, columns = k[rows], v[rows], list(rows)
            if i in joint:
                for column in range(mask.shape[1]):
                    if mask[segment, column]:
                        token = text[segment, column]
                        place = end[segment] + column
                        extra_key = rotate(attention.instruct_key_proj(token).view(heads, head), place, place)
                        keys = torch.cat([keys, extra_key[None]])
                        columns.append(len(x) + segment * mask.shape[1] + column)
                        values = torch.cat([values, attention.instruct_value_proj(token).view(1, heads, head)])
            weights = torch.einsum("qhd,khd->hqk", q[rows], keys) / math.sqrt(head)
            weights = functional.softmax(weights, -1)
            for row, of_row in zip(rows, weights.unbind(1), strict=True):
                attended[:, row, columns] = of_row
            out[rows] = torch.einsum("hqk,khd->qhd", weights, values)
        if seen is not None:
            seen.append(attended)
        x = x + attention.proj(out.flatten(1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x)
