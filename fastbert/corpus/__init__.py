"""A corpus of tables into a folder of Parquet files with vectors: `fastbert encode IN... --out-dir DIR`.

    job.py        what is asked for: inputs, columns, encoder, precision; what of it must not change when a run goes on
    places.py     folders, local ones and those behind URLs; files in them are whole or not there
    reading.py    tables in (.parquet, .arrow, .feather, .jsonl, .csv), a few hundred rows at a time
    units.py      which rows make which part, by the input alone
    writing.py    a part out: one schema, every option of the writer settled and checked
    manifest.py   which parts count
    run.py        reading and tokenising, computing, and writing, each in its own thread
    pool.py       several processes
    verify.py     every part read again and held against the manifest
    search.py     the nearest rows of a finished folder

A part is a function of its unit and the job, so who computes it, when and beside whom makes no difference.
"""
