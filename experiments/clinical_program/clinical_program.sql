-- A program as the note generator, at a pinned git commit, against the rubrics of the demo (run demo.sql first).
--
--     psql -v repository=/path/to/clone -v commit=COMMIT -f clinical_program.sql
--
-- The README beside this file makes the clone. Workers need --allow-code for provider "command".

-- models.model goes to the program as PGHARNESS_MODEL: here it chooses between two ways to write.
insert into pgharness.models (name, description, provider, model, parameters, timeout_seconds)
values
    ('program/full', 'generate.py: everything that was said.', 'command', 'full',
     jsonb_build_object('command', array['python3', 'generate.py'], 'repository', :'repository'), 30),
    ('program/brief', 'generate.py: three lines a section.', 'command', 'brief',
     jsonb_build_object('command', array['python3', 'generate.py'], 'repository', :'repository'), 30)
on conflict (name) do update set parameters = excluded.parameters;

-- software_version says at which commit of the repository the program runs; the overlaps multiply the notes.
insert into pgharness.instances (name, experiment, description, software_version, cycle_transcript_overlaps)
values ('clinical-program', 'note_grade', 'A program at a pinned commit, with and without memory.', :'commit', '{0,100}')
on conflict (name) do update set software_version = excluded.software_version;

select pgharness.add_cases('clinical-program', eligible => true, dataset => 'demo') as cases_added;

insert into pgharness.model_combinations (instance, generator, grader)
values ('clinical-program', 'program/full', 'demo/grader'),
       ('clinical-program', 'program/brief', 'demo/grader')
on conflict do nothing;

