"""Reads what finished runs left, compares arms, and measures the targeting. Trains and draws nothing.

scores      tables of runs and of scores per example, from batches and run folders
statistics  intervals, paired tests and gains of arrays
compare     arms against a baseline, worlds apart and together
protocol    the paper's conditions and a verdict on each of its claims
summary     what a few runs of one setting say, in sentences and short tables
study       tables, figures and the page of a study
tuning      settings chosen for each arm with equal effort
targeting   how well targeted tokens match those that decide, where the data know them
masking     what masking targeted tokens does to a student, where they do not (needs torch)
"""
