"""A/B tests of profiles: who gets which arm, what came of it, and what that proves.

definitions.py   what an experiment is
records.py       what is kept of each answer
assignment.py    unit -> arm, by hash
choosing.py      which arm or profile answers a request
registry.py      a server's experiments, their versions and stopped arms (api.py: endpoints)
recording.py     what becomes of an answer: its record, shadows (shadow.py), guard-rails
                 (guard.py), a slower judge (judging.py)
store.py         journal.py -> writer.py -> database.py, whose tables are in migrations/
reading.py       reads records off the event loop
sequential.py    statistics that hold however often one looks
analysis.py      records -> rates and differences (correction.py: for the judge's errors)
verdict.py       a difference -> better, worse, no difference, inconclusive, blocked
report_making.py all of it together: records -> a report, and what its readers must know first
                 (report_warnings.py)
report.py        what it holds, as JSON; report_text.py, report_page.py, report_plots.py show it
record_file.py   records in files, for reports without a server
interfaces.py    the seams between these parts
"""
