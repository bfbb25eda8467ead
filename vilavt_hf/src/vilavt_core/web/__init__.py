"""The web app of ``vilavt web``: images are dropped and asked about, and every zoom is shown where it was made.

`exhibits` draws what was said as HTML, `desk` keeps each visitor's dialogue to themselves, `app` puts them on a page of
Gradio (extra ``web``).
"""
