-- Runs of code: what they told, what their tasks gave, and which experiments there are.

create or replace view pgharness.experiment_list with (security_invoker = true) as
select e.name as experiment, e.kind, e.description, coalesce(used.instance_count, 0) as instance_count, coalesce(used.run_count, 0) as run_count,
       version.number as version, version.module, version.function,
       e.kind = 'note_grade' or exists (select from pgharness.worker_health as w where w.status = 'running' and e.name = any (w.experiments)) as is_served,
       used.last_run_at, version.git_commit, version.is_dirty, version.created_at as registered_at
  from pgharness.experiments as e
  left join pgharness.experiment_versions as version on version.experiment_id = e.id and version.number = e.version
 cross join lateral (
       select count(distinct i.id) as instance_count, count(r.id) as run_count, max(r.created_at) as last_run_at
         from pgharness.instances as i left join pgharness.runs as r on r.instance_id = i.id where i.experiment_id = e.id) as used;
comment on view pgharness.experiment_list is 'One row per experiment: what it is, its current version, and what was made of it. Example: select * from pgharness.experiment_list order by last_run_at desc nulls last;';
comment on column pgharness.experiment_list.kind is 'note_grade, or code.';
comment on column pgharness.experiment_list.version is 'The current one: that which was registered last; null unless it is code.';
comment on column pgharness.experiment_list.instance_count is 'Instances of it.';
comment on column pgharness.experiment_list.run_count is 'Runs of those.';
comment on column pgharness.experiment_list.module is 'What a worker imports: a dotted name, or path: and a file.';
comment on column pgharness.experiment_list.function is 'The function or class in it.';
comment on column pgharness.experiment_list.last_run_at is 'When the latest of its runs was started.';
comment on column pgharness.experiment_list.git_commit is 'Of the working directory that it was registered from.';
comment on column pgharness.experiment_list.registered_at is 'When that version was seen first.';
comment on column pgharness.experiment_list.is_served is 'Whether a running worker has its code.';
comment on column pgharness.experiment_list.is_dirty is 'Whether the working directory had changes that were not committed.';

create or replace view pgharness.task_results with (security_invoker = true) as
select t.run_id, r.name as run, t.ordinal, t.parent_ordinal, t.map, t.key, t.status, t.result, t.error, t.attempts, t.started_at, t.finished_at,
       t.argument, t.function, t.failures, t.crashes, t.traceback
  from pgharness.tasks as t
  join pgharness.runs as r on r.id = t.run_id;
comment on view pgharness.task_results is
'One row per task of a run of code: its function (ordinal 0), and each item of its maps. Example: select key, result from pgharness.task_results where run_id = 1 and map = ''score'' order by ordinal;';
comment on column pgharness.task_results.ordinal is 'Its number in the run, from 0.';
comment on column pgharness.task_results.parent_ordinal is 'The task that maps; null for the run''s function.';
comment on column pgharness.task_results.map is 'Which map of its parent it is of.';
comment on column pgharness.task_results.key is 'What tells it from the other items of its map.';
comment on column pgharness.task_results.status is 'waiting, succeeded or failed.';
comment on column pgharness.task_results.result is 'What it returned.';
comment on column pgharness.task_results.attempts is 'Times that it was begun.';
comment on column pgharness.task_results.argument is 'The item.';
comment on column pgharness.task_results.function is 'What is called: module:function.';
comment on column pgharness.task_results.failures is 'Times that it failed.';
comment on column pgharness.task_results.crashes is 'Times that its process died while it ran.';
comment on column pgharness.task_results.traceback is 'Of the exception by which it failed last.';

create or replace view pgharness.run_metrics with (security_invoker = true) as
select m.run_id, r.name as run, m.created_at, m.name, m.value, m.metric_type, m.step, m.data, m.task, m.id
  from pgharness.metrics as m
  join pgharness.runs as r on r.id = m.run_id;
comment on view pgharness.run_metrics is 'One row per number that a run''s code recorded. Example: select name, value from pgharness.run_metrics where run_id = 1 order by id;';
comment on column pgharness.run_metrics.metric_type is 'What kind of number it is, in the experiment''s words.';
comment on column pgharness.run_metrics.step is 'Where in a series it stands.';
comment on column pgharness.run_metrics.data is 'More about it, as JSON.';
comment on column pgharness.run_metrics.task is 'The task that told it: 0 is the run''s function.';

create or replace view pgharness.run_metric_totals with (security_invoker = true) as
select m.run_id, r.name as run, m.name, count(*) as value_count, avg(m.value) as mean_value, min(m.value) as min_value, max(m.value) as max_value,
       (array_agg(m.value order by m.id desc))[1] as last_value
  from pgharness.metrics as m
  join pgharness.runs as r on r.id = m.run_id
 where m.value not in ('NaN', 'Infinity', '-Infinity')
 group by m.run_id, r.name, m.name;
comment on view pgharness.run_metric_totals is
'One row per run and metric that its code recorded: its finite values in short. Example: select name, mean_value from pgharness.run_metric_totals where run_id = 1;';
comment on column pgharness.run_metric_totals.last_value is 'The value that was recorded last.';
comment on column pgharness.run_metric_totals.value_count is 'How many there are.';
comment on column pgharness.run_metric_totals.mean_value is 'Their mean.';
comment on column pgharness.run_metric_totals.min_value is 'The lowest.';
comment on column pgharness.run_metric_totals.max_value is 'The highest.';

create or replace view pgharness.run_timings with (security_invoker = true) as
select t.run_id, r.name as run, t.created_at, t.operation, t.duration_ms, t.task, t.id
  from pgharness.timings as t
  join pgharness.runs as r on r.id = t.run_id;
comment on view pgharness.run_timings is 'One row per operation that a run''s code timed. Example: select operation, avg(duration_ms) from pgharness.run_timings where run_id = 1 group by operation;';
comment on column pgharness.run_timings.operation is 'What was timed, in the experiment''s words.';
comment on column pgharness.run_timings.duration_ms is 'How long it took.';
comment on column pgharness.run_timings.task is 'The task that told it: 0 is the run''s function.';

create or replace view pgharness.run_llm_calls with (security_invoker = true) as
select c.run_id, r.name as run, c.created_at, c.model, c.input, c.output, c.duration_ms, c.error, c.task, c.id
  from pgharness.logged_calls as c
  join pgharness.runs as r on r.id = c.run_id;
comment on view pgharness.run_llm_calls is
'One row per request to a model that a run''s code made without the harness and told of. Example: select model, count(*), avg(duration_ms) from pgharness.run_llm_calls where run_id = 1 group by model;';
comment on column pgharness.run_llm_calls.model is 'The model as the code names it.';
comment on column pgharness.run_llm_calls.error is 'How it failed; null when it did not.';
comment on column pgharness.run_llm_calls.input is 'What it was asked.';
comment on column pgharness.run_llm_calls.output is 'What it answered.';
comment on column pgharness.run_llm_calls.duration_ms is 'How long that took; null when it was not said.';
comment on column pgharness.run_llm_calls.task is 'The task that told it: 0 is the run''s function.';

create or replace view pgharness.run_artifacts with (security_invoker = true) as
select a.run_id, r.name as run, a.name, a.size_bytes, a.media_type, a.digest, a.created_at, a.task
  from pgharness.artifacts as a
  join pgharness.runs as r on r.id = a.run_id;
comment on view pgharness.run_artifacts is
'One row per file that a run keeps; artifact_contents has the bytes by digest. Example: select name, size_bytes from pgharness.run_artifacts where run_id = 1;';
comment on column pgharness.run_artifacts.digest is 'SHA-256 of its content.';
comment on column pgharness.run_artifacts.size_bytes is 'How large it is.';
comment on column pgharness.run_artifacts.media_type is 'What kind of file it is: text/plain, image/png.';
comment on column pgharness.run_artifacts.task is 'The task that told it: 0 is the run''s function.';
