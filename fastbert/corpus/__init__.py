"""A corpus of tables into a folder of Parquet files with vectors: `fastbert encode IN... --out-dir DIR`.

    job.py        the settings of a run, and which of them must be the same when a run is resumed
    places.py     local folders and folders behind URLs, in which files are written whole or not at all
    reading.py    reads tables (.parquet, .arrow, .feather, .jsonl, .csv), a few hundred rows at a time
    units.py      which rows make which part; the input alone decides that
    writing.py    writes a part: one schema, every option of the Parquet writer fixed and checked
    manifest.py   which parts count
    run.py        one process: reading and tokenising, computing, and writing, each in its own thread
    pool.py       several processes
    verify.py     reads every part again and compares it with the manifest
    search.py     the nearest rows to a vector

A unit is a range of rows of one input file. A part is the Parquet file that is made of one unit. It depends on the unit
and the settings only, not on which process computes it or when.
"""
