"""What a person looks at: HTML, figures and tables of targets, runs and attention; the explorer.

It owns no numbers: they come from records (``core.facts``) and from ``analysis``. A view (``view``) is a
heading, a figure with its arguments and a table. What words and boxes look like is decided once, in
``sheet`` (values of tokens), ``scale`` (colours), ``statement`` and ``picture`` (HTML); ``figures`` draws the
same sheets with matplotlib and ``static`` in the explorer's page. ``compare``, ``training``, ``alignment``,
``attention`` and ``measures`` make views; ``index`` finds runs and examples, ``explorer`` knows every view of
one, ``widgets`` are its controls; ``gallery`` shows examples of the data.
"""
