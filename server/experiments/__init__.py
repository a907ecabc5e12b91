"""A/B tests of profiles: who gets which arm, what came of it, and what that proves.

definitions.py   what an experiment is
assignment.py    unit -> arm, by hash
records.py       what is kept of each answer
store.py         where it is kept: journal.py -> writer.py -> database.py (migrations/: its tables)
sequential.py    statistics that hold however often one looks
analysis.py      records -> whose answers count, and sequences of means and differences
correction.py    rates corrected for the judge's errors
verdict.py       what a sequence proves, and how many more units it may need
guard.py         stops an arm whose rate is surely above a limit
report.py        all of it: report_text.py, report_page.py, report_plots.py show it
record_file.py   records and definitions in files
"""
