"""Draws targets, runs and attention for people: HTML, figures and tables, and the explorer.

It computes no results: numbers come from records (``core.facts``) and from ``analysis``. A view (``view``) is
a heading, a figure with its arguments and a table.

sheet                            a value for every token of a statement, and which marks occur
scale, statement, picture        colours, and the HTML of words and boxes
figures                          the same sheets, and everything else, drawn by matplotlib
compare, evolution, alignment,
attention, lesson, measures      functions that make views
gallery, captions                examples of the data; numbered figures of a notebook
index, explorer                  find runs and examples; make every view of an example
widgets, controls, static        the explorer's controls, and their scripts in the page
"""
