-- What is there from the start: the note_grade experiment with its prompts, the metrics, and the simulator. Inserts only.

insert into pgharness.experiments (name, description, note_system_prompt, note_prompt, grade_system_prompt, grade_prompt)
values (
    'note_grade',
    'A model writes a note for each case; a grader scores it against rubrics or the case''s target.',
    'You write clear, accurate and concise notes. Record only what the input supports; leave out what it does not say.',
    E'Write the note for this case.\n\n{{ case_text }}',
    'You are a strict and fair grader. You judge only by the criteria given to you, and only what the note says.',
    E'Grade the note below against each criterion, in order.\n\n'
    '{% if target is not none %}Expected answer:\n{{ target }}\n\n{% endif %}'
    'Criteria:\n{% for c in criteria %}{{ c.number }}. {{ c.criterion }}\n{% endfor %}\n'
    'Note:\n<note>\n{{ note }}\n</note>\n\n'
    'For each of the {{ criteria | length }} criteria, in the order given, first write a rationale of one or two sentences, '
    'then a satisfaction from 0 (not met at all) to 100 (fully met). '
    'Answer with JSON: {"verdicts": [{"rationale": "...", "satisfaction": 0}]}, with exactly {{ criteria | length }} verdicts.'
);

insert into pgharness.models (name, description, provider, model)
values ('exact_match', 'Scores 1 when the output equals the target; options ignore_case, ignore_space.', 'metric', 'exact_match'),
       ('numeric_match', 'Scores 1 when the last number of the output equals the target; options absolute_tolerance, relative_tolerance.', 'metric', 'numeric_match'),
       ('contains', 'Scores 1 when the output contains the target; option ignore_case.', 'metric', 'contains'),
       ('regex', 'Scores 1 when the pattern (option pattern, or the target) is found in the output; option ignore_case.', 'metric', 'regex'),
       ('simulator', 'Answers and grades by itself, seeded: no network, no key, no cost.', 'simulator', '');
