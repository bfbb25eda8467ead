"""The loop inside vLLM's own OpenAI server: one ordinary chat request in, the final answer out.

`endpoint` is the plug-in that vLLM's server loads, `requests` what a request may be, `history` finds the conversation
that a request continues, `states` signs and reads those that clients keep, `media` fetches images, `metrics` counts,
`command` is ``vilavt-serve``.
"""
