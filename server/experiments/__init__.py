"""A/B tests of profiles: who gets which arm, what came of it, and what that proves.

definitions.py   what an experiment is
records.py       what is kept of each answer
assignment.py    unit -> arm, by hash
choosing.py      which arm or profile answers a request
registry.py      a server's experiments, their versions and stopped arms (api.py: endpoints)
recording.py     what becomes of an answer: its record, shadows (shadow.py), guard-rails
                 (guard.py), a slower judge (judging.py)
store.py         journal.py -> writer.py -> database.py, whose tables are in migrations/
sequential.py    statistics that hold however often one looks
analysis.py      records -> rates and differences (correction.py: for the judge's errors)
verdict.py       a difference -> better, worse, no difference, inconclusive, blocked
report.py        all of it together, as JSON, text, page and plots
interfaces.py    the seams between these parts
"""
