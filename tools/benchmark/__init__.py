"""tools/bench: what a migration costs, measured beside the floor that the machine sets. docs/performance.md explains.

    scenarios.py   what is measured: one knob each          run.py       one migration between two namespace hosts
    subject.py     a process with so much memory, threads,  client.py    a Redis client that times every answer
                   mappings, descriptors                    floors.py    the same bytes, moved without Ferry
    samples.py     instants of answers, gaps, percentiles   shaping.py   a slower link
    table.py, page.py, plot.py, compare.py                  results as text, as HTML, against older ones

Programs that are started inside hosts: subject, client, floors. Everything else runs outside and only looks.
Times of all processes are CLOCK_MONOTONIC nanoseconds of one machine.
"""
