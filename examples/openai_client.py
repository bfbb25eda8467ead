"""A plain OpenAI client that runs the zoom loop itself, against any vLLM that serves a ViLaVT.

    python examples/openai_client.py http://127.0.0.1:8000/v1 CHECKPOINT PICTURE "question"

(vilavt-serve: http://127.0.0.1:8000/v1/raw; key: OPENAI_API_KEY.) Turns go back as they came, so vLLM caches them.
"""

import base64
import io
import os
import sys

from openai import OpenAI

from vilavt_core.images import load_image
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import RESPONSE_CLOSE, RESPONSE_OPEN, ToolCall, parse_turn
from vilavt_core.regions import Gallery
from vilavt_core.settings import preset_of


def png(image) -> dict:
    file = io.BytesIO()
    image.save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def converse(client: OpenAI, model: str, checkpoint: str, picture: str, question: str):
    """Yields (text, usage) of every assistant turn; the last one is the answer, or the turns are used up."""
    prompts, limits = PromptSet.load(f"{checkpoint}/prompts"), preset_of(checkpoint).limits
    gallery = Gallery(min_pixels=limits.min_pixels)

    def user(*parts) -> dict:
        content = [{"type": "text", "text": p} if isinstance(p, str) else png(gallery.views[p].image) for p in parts]
        return {"role": "user", "content": content}

    shown = gallery.add_original(load_image(picture), limits.max_pixels).image
    intro = prompts.text("images_one", width=shown.width, height=shown.height)
    asked = [*prompts.render("original", image=0, index=0), *prompts.render("user", images=intro, question=question)]
    messages = [{"role": "system", "content": prompts.text("system")}, user(*asked)]
    for turn in range(limits.max_turns):
        reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
        yield (text := reply.choices[0].message.content), reply.usage
        if not isinstance(action := parse_turn(text), ToolCall):
            return
        messages.append({"role": "assistant", "content": text})
        new, first = [RESPONSE_OPEN], len(gallery)
        for i, view in enumerate(gallery.crop(action, limits.max_pixels), first):
            new += prompts.render("crop", image=i, index=i, width=view.image.width, height=view.image.height)
        ending = prompts.render("final" if turn + 2 == limits.max_turns else "continue")
        messages.append(user(*new, *ending, RESPONSE_CLOSE))


if __name__ == "__main__":
    openai = OpenAI(base_url=sys.argv[1], api_key=os.environ.get("OPENAI_API_KEY", "none"))
    for text, usage in converse(openai, openai.models.list().data[0].id, *sys.argv[2:]):
        cached = getattr(usage.prompt_tokens_details, "cached_tokens", "?")  # ? without --enable-prompt-tokens-details
        print(text, f"[{cached} of {usage.prompt_tokens} prompt tokens cached]", sep="\n")
