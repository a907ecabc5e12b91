"""A/B tests of profiles: who gets which arm, what came of it, and what that proves.

definitions.py   what an experiment is
assignment.py    unit -> arm, by hash
records.py       what is kept of each answer
store.py         where it is kept: journal.py -> writer.py -> database.py (migrations/: its tables)
sequential.py    statistics that hold however often one looks
report.py        records -> rates, differences, verdict
"""
