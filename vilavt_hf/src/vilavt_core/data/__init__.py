"""Training data: what a record may be (`schema`), where records are (`annotations`, `registry`), how one becomes tokens
(`rendering`), the data set of a run (`dataset`), and the tools around it (`check`, `unpack`)."""
