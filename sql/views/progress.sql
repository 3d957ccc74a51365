-- Watching runs: how far they are, what happened last, what failed, who works, what is stuck, what is left.

create or replace view pgharness.run_progress with (security_invoker = true) as
select r.id as run_id, r.name as run, r.instance, r.kind, r.status, r.reason, computed.percent_done,
       r.note_count, computed.notes_running, r.notes_succeeded, r.notes_failed, computed.notes_waiting,
       r.grade_count, computed.grades_running, r.grades_succeeded, r.grades_failed, r.grades_skipped, computed.grades_waiting,
       computed.items_per_second, computed.seconds_left, computed.expected_finish_at,
       round(pgharness._cost_usd(r), 6) as cost_usd, computed.projected_cost_usd, r.budget_usd,
       computed.worker_count, computed.active_seconds, r.created_at as started_at, r.finished_at,
       r.task_count, r.tasks_succeeded, r.tasks_failed, report.position, report.total, report.message
  from pgharness.runs as r
 cross join lateral pgharness._run_progress(r) as computed
  left join pgharness.progress_reports as report on report.run_id = r.id;
comment on view pgharness.run_progress is
'One row per run: state, what is planned and done, speed, cost. Cheap at any size: it reads the run''s counters, never its notes. Example: select * from pgharness.run_progress where run_id = 1;';
comment on column pgharness.run_progress.kind is 'trial or milestone.';
comment on column pgharness.run_progress.status is 'running, paused, completed, failed or cancelled.';
comment on column pgharness.run_progress.reason is 'Why it is paused, failed or cancelled.';
comment on column pgharness.run_progress.percent_done is 'Share of the planned notes and grades that are decided: succeeded, failed or skipped. 100 only when all are. Of code: what it said of itself, else the share of its tasks so far.';
comment on column pgharness.run_progress.note_count is 'Notes planned.';
comment on column pgharness.run_progress.notes_failed is 'Notes that failed for good; failed_items lists them, retry_failed() tries them again.';
comment on column pgharness.run_progress.notes_waiting is 'Notes whose last try failed and that wait for their next one.';
comment on column pgharness.run_progress.grade_count is 'Grades planned.';
comment on column pgharness.run_progress.grades_failed is 'Grades that failed for good.';
comment on column pgharness.run_progress.grades_skipped is 'Planned grades of notes that failed for good.';
comment on column pgharness.run_progress.grades_waiting is 'Grades whose last try failed and that wait for their next one.';
comment on column pgharness.run_progress.items_per_second is 'Notes and grades decided per active second, over the whole run.';
comment on column pgharness.run_progress.seconds_left is 'What is left divided by items_per_second; null unless it is running and something is done.';
comment on column pgharness.run_progress.projected_cost_usd is
'Cost so far plus what is left at the mean cost of the notes and grades decided; null before the first of each is.';
comment on column pgharness.run_progress.budget_usd is 'Cost at which the run pauses; null means none.';
comment on column pgharness.run_progress.worker_count is 'Workers with a heartbeat in the last 30 seconds that took work of this run; 0 unless it is running.';
comment on column pgharness.run_progress.notes_running is 'Notes for which a call is in flight, by the workers'' last heartbeats; likewise grades_running.';
comment on column pgharness.run_progress.grades_running is 'Grades for which a call is in flight, by the workers'' last heartbeats.';
comment on column pgharness.run_progress.active_seconds is 'Seconds spent running; pauses do not count.';
comment on column pgharness.run_progress.task_count is 'Of code: its function, and the items of its maps so far.';
comment on column pgharness.run_progress.tasks_failed is 'Tasks that failed for good; task_results lists them.';
comment on column pgharness.run_progress.tasks_succeeded is 'Tasks that are done.';
comment on column pgharness.run_progress.total is 'Of code: how far it will be in the end.';
comment on column pgharness.run_progress.position is 'Of code: how far it says it is, of total; and its message.';

create or replace view pgharness.recent_activity with (security_invoker = true) as
select latest.at as created_at, r.id as run_id, r.name as run, latest.kind, ca.name as case_name, c.name as combination,
       latest.status, latest.score, latest.error
  from pgharness.runs as r
  join pgharness.run_definitions as d on d.run_id = r.id
 cross join lateral (
       select newest.*
         from ((select n.created_at as at, 'note' as kind, n.ordinal as note_ordinal, 'succeeded' as status, null::numeric as score, null as error
                  from pgharness.notes as n where n.run_id = r.id order by n.created_at desc limit 100)
               union all
               (select g.created_at, 'grade', g.note_ordinal, 'succeeded', round(g.score / g.max_score, 4), null
                  from pgharness.grades as g where g.run_id = r.id order by g.created_at desc limit 100)
               union all
               (select f.updated_at, f.kind, case when f.kind = 'note' then f.ordinal else f.ordinal / d.grade_stride end, f.status, null, f.error
                  from pgharness.failures as f where f.run_id = r.id order by f.updated_at desc limit 100)) as newest
        order by newest.at desc limit 100) as latest
 cross join lateral pgharness._note_place(d, latest.note_ordinal) as place
  join pgharness.run_cases as rc on rc.run_id = r.id and rc.number = place.case_number
  join pgharness.cases as ca on ca.id = rc.case_id
  join pgharness.run_combinations as c on c.run_id = r.id and c.number = place.combination_number
 order by latest.at desc;
comment on view pgharness.recent_activity is
'One row per note or grade that lately succeeded, failed, or had to be put off, newest first: the latest 100 of each run. Example: select * from pgharness.recent_activity where run_id = 1 limit 10;';
comment on column pgharness.recent_activity.kind is 'note or grade.';
comment on column pgharness.recent_activity.status is 'succeeded, failed, or waiting (its last try failed; it will be tried again).';
comment on column pgharness.recent_activity.score is 'A grade''s score as a share of the highest possible (0..1).';

create or replace view pgharness.failed_items with (security_invoker = true) as
select r.id as run_id, r.name as run, f.kind, ca.name as case_name, c.name as combination, place.overlap, place.replication,
       ru.author as rubric_author, grade.replication as grade_replication,
       f.status, f.cause, f.error, f.answer, f.attempts, f.delays, f.next_attempt_at, f.updated_at, f.ordinal
  from pgharness.failures as f
  join pgharness.runs as r on r.id = f.run_id
  join pgharness.run_definitions as d on d.run_id = f.run_id
 cross join lateral pgharness._note_place(d, case when f.kind = 'note' then f.ordinal else f.ordinal / d.grade_stride end) as place
  join pgharness.run_cases as rc on rc.run_id = f.run_id and rc.number = place.case_number
  join pgharness.cases as ca on ca.id = rc.case_id
  join pgharness.run_combinations as c on c.run_id = f.run_id and c.number = place.combination_number
  left join lateral pgharness._grade_place(c, (f.ordinal % d.grade_stride)::integer) as grade on f.kind = 'grade'
  left join pgharness.run_rubrics as rr on rr.run_id = f.run_id and rr.case_number = place.case_number and rr.number = grade.rubric_number
  left join pgharness.rubrics as ru on ru.id = rr.rubric_id;
comment on view pgharness.failed_items is
'One row per note or grade that failed for good or waits for its next try. Example: select * from pgharness.failed_items where run_id = 1 and status = ''failed'';';
comment on column pgharness.failed_items.kind is 'note or grade.';
comment on column pgharness.failed_items.overlap is 'The transcript overlap that the generator was given.';
comment on column pgharness.failed_items.replication is 'Which note of its case, combination and overlap it is, or belongs to (from 1).';
comment on column pgharness.failed_items.rubric_author is 'Whose rubric a grade is by; null for notes, and for grades against the target.';
comment on column pgharness.failed_items.grade_replication is 'Which grade of its note and rubric it is (from 1); null for notes.';
comment on column pgharness.failed_items.status is 'failed (retry_failed() tries it again) or waiting (until next_attempt_at).';
comment on column pgharness.failed_items.cause is 'How its last try ended: the outcome of its call, crashed (a worker died of it) or not_recordable.';
comment on column pgharness.failed_items.answer is 'What the model answered, or the end of a program''s output, when that was what failed.';
comment on column pgharness.failed_items.attempts is 'Attempts spent, of the instance''s max_attempts.';
comment on column pgharness.failed_items.delays is 'Tries that spent no attempt: rate limits and outages.';
comment on column pgharness.failed_items.ordinal is 'Its number in the run''s plan.';

create or replace view pgharness.failure_causes with (security_invoker = true) as
select r.id as run_id, r.name as run, found.kind, found.cause, found.items_failed, found.items_waiting, found.calls_failed,
       coalesce((select f.error from pgharness.failures as f
                  where f.run_id = r.id and f.kind = found.kind and f.cause = found.cause order by f.updated_at desc limit 1),
                (select c.error from pgharness.calls as c where c.id = found.call_id)) as example_error,
       found.last_at
  from pgharness.runs as r
 cross join lateral (
       select each.kind, each.cause, sum(each.failed)::bigint as items_failed, sum(each.waiting)::bigint as items_waiting,
              sum(each.calls)::bigint as calls_failed, max(each.call_id) as call_id, max(each.at) as last_at
         from (select f.kind, f.cause, count(*) filter (where f.status = 'failed') as failed, count(*) filter (where f.status = 'waiting') as waiting,
                      0 as calls, null::bigint as call_id, max(f.updated_at) as at
                 from pgharness.failures as f where f.run_id = r.id group by f.kind, f.cause
               union all
               select c.kind, c.outcome, 0, 0, count(*), max(c.id), max(c.started_at)
                 from pgharness.calls as c
                where c.run_id = r.id and c.outcome not in ('succeeded', 'cached', 'cancelled') group by c.kind, c.outcome) as each
        group by each.kind, each.cause) as found;
comment on view pgharness.failure_causes is
'One row per run, kind of item (note, grade) and cause of failure: how many items it holds up, and how many calls ended so, those included that succeeded at a later try. Example: select * from pgharness.failure_causes where run_id = 1 order by calls_failed desc;';
comment on column pgharness.failure_causes.kind is 'note or grade.';
comment on column pgharness.failure_causes.cause is 'The outcome of the calls, or crashed (a worker died of it) or not_recordable, which have no call.';
comment on column pgharness.failure_causes.items_failed is 'Items that failed for good, and last by this cause.';
comment on column pgharness.failure_causes.items_waiting is 'Items whose last try failed so, and that wait for their next one.';
comment on column pgharness.failure_causes.calls_failed is 'Calls that ended so.';
comment on column pgharness.failure_causes.example_error is 'The latest error of such an item, or else of such a call.';

create or replace view pgharness.worker_health with (security_invoker = true) as
select w.id as worker_id, w.host, w.pid, w.version,
       case when w.status in ('running', 'draining') and beat.seconds > 30 then 'stale' else w.status end as status,
       w.queues, w.concurrency,
       (select coalesce(sum(c.value::integer), 0) from jsonb_each(w.in_flight) as r cross join lateral jsonb_each_text(r.value) as c) as in_flight, round(beat.seconds, 1) as seconds_since_heartbeat,
       case when w.status in ('running', 'draining')
            then array(select r.name from pgharness.run_workers as rw join pgharness.runs as r on r.id = rw.run_id
                        where rw.worker_id = w.id and r.status = 'running' order by r.id) else '{}' end as runs,
       w.started_at, w.heartbeat_at, w.experiments
  from pgharness.workers as w
 cross join lateral (select extract(epoch from pgharness.clock() - w.heartbeat_at) as seconds) as beat;
comment on view pgharness.worker_health is
'One row per worker process that ever registered. Example: select * from pgharness.worker_health where status in (''running'', ''draining'', ''stale'');';
comment on column pgharness.worker_health.pid is 'Its process id on its host.';
comment on column pgharness.worker_health.version is 'The version of pgharness that it runs.';
comment on column pgharness.worker_health.status is
'running, draining (it ends its calls and stops), stale (no heartbeat for 30 seconds; a sweep will call it lost), lost (it died, and its work was put back) or stopped.';
comment on column pgharness.worker_health.queues is 'The queues it serves: note, grade, task (code).';
comment on column pgharness.worker_health.experiments is 'Experiments in code that it has.';
comment on column pgharness.worker_health.concurrency is 'Calls that it may have in flight.';
comment on column pgharness.worker_health.in_flight is 'Calls in flight at its last heartbeat.';
comment on column pgharness.worker_health.runs is 'Running runs that it took work of.';

create or replace view pgharness.queue_health with (security_invoker = true) as
select queue.name as queue, coalesce(job.waiting, 0) as jobs_waiting, coalesce(job.scheduled, 0) as jobs_scheduled, coalesce(job.doing, 0) as jobs_doing,
       (select round(extract(epoch from pgharness.clock() - max(e.at)), 1)
          from procrastinate.procrastinate_events as e where e.job_id = job.oldest_id) as oldest_waiting_seconds,
       (select count(*) from pgharness.worker_health as w where w.status = 'running' and queue.name = any (w.queues)) as worker_count
  from (select 'note' as name union select 'grade' union select 'task' union select j.queue_name from procrastinate.procrastinate_jobs as j) as queue
  left join (select j.queue_name,
                    count(*) filter (where j.status = 'todo' and (j.scheduled_at is null or j.scheduled_at <= pgharness.clock())) as waiting,
                    count(*) filter (where j.status = 'todo' and j.scheduled_at > pgharness.clock())                              as scheduled,
                    count(*) filter (where j.status = 'doing')                                                                    as doing,
                    min(j.id) filter (where j.status = 'todo' and (j.scheduled_at is null or j.scheduled_at <= pgharness.clock())) as oldest_id
               from procrastinate.procrastinate_jobs as j group by j.queue_name) as job on job.queue_name = queue.name;
comment on view pgharness.queue_health is
'One row per queue: its jobs, each a slice of a run''s notes or grades or of the tasks of its code, and the workers that serve it.';
comment on column pgharness.queue_health.jobs_waiting is 'Jobs that a worker could take now.';
comment on column pgharness.queue_health.jobs_scheduled is 'Jobs for later: next tries of items that failed.';
comment on column pgharness.queue_health.jobs_doing is 'Jobs that workers have taken.';
comment on column pgharness.queue_health.oldest_waiting_seconds is 'Since when the oldest of the waiting jobs has been queued; null when none waits.';
comment on column pgharness.queue_health.worker_count is 'Running workers, with a heartbeat in the last 30 seconds, that serve it.';

create or replace view pgharness.stalled_work with (security_invoker = true) as
select r.id as run_id, r.name as run, trouble.problem, trouble.remedy, progress.last_at as last_progress_at
  from pgharness.runs as r
 cross join lateral (
       select greatest(r.activated_at,
                       (select max(t.finished_at) from pgharness.tasks as t where t.run_id = r.id),
                       (select max(n.created_at) from pgharness.notes as n where n.run_id = r.id),
                       (select max(g.created_at) from pgharness.grades as g where g.run_id = r.id),
                       (select max(f.updated_at) from pgharness.failures as f where f.run_id = r.id),
                       (select max(greatest(b.gathered_at, b.submitted_at, b.polled_at, b.finished_at)) from pgharness.batches as b where b.run_id = r.id)) as last_at) as progress
 cross join lateral (
       select string_agg(queue.name, ',' order by queue.name desc) as unserved
         from (values ('note', r.note_count - r.notes_succeeded - r.notes_failed),
                      ('grade', r.grade_count - r.grades_succeeded - r.grades_failed - r.grades_skipped),
                      ('task', r.task_count - r.tasks_succeeded - r.tasks_failed)) as queue (name, items_left)
        where queue.items_left > 0
          and not exists (select from pgharness.worker_health as w
                           where w.status = 'running' and queue.name = any (w.queues)
                             and (queue.name <> 'task' or (select d.definition ->> 'experiment' from pgharness.run_definitions as d where d.run_id = r.id) = any (w.experiments)))) as staff
 cross join lateral (
       select (select count(*) from procrastinate.procrastinate_jobs as j
                where j.task_name = 'pgharness.slice' and j.status in ('todo', 'doing') and (j.args ->> 'run_id')::bigint = r.id)
              + (select count(*) from pgharness.batches as b where b.run_id = r.id and b.finished_at is null) as job_count) as queued
 cross join lateral (
       -- as long as a call may take, so that a slow model is not taken for a stalled one
       select 300 + max(greatest((c.generator ->> 'timeout_seconds')::double precision, (c.grader ->> 'timeout_seconds')::double precision)) as seconds
         from pgharness.run_combinations as c where c.run_id = r.id) as patience
  left join lateral (
       select m.name, l.blocked_until
         from pgharness.run_combinations as c
         join pgharness.models as m on m.id in (c.generator_id, c.grader_id)
         join pgharness.model_limits as l on l.model_id = m.id
        where c.run_id = r.id and l.blocked_until > pgharness.clock() order by l.blocked_until desc limit 1) as blocked on true
 cross join lateral (
       select case when staff.unserved = 'task' then format('no running worker has the code of experiment "%s"', (select d.definition ->> 'experiment' from pgharness.run_definitions as d where d.run_id = r.id))
                   when staff.unserved is not null then format('no running worker serves queue %s', replace(staff.unserved, ',', ', '))
                   when queued.job_count = 0 then 'it has work left and no job in the queue'
                   when progress.last_at < pgharness.clock() - make_interval(secs => patience.seconds) and blocked.name is not null
                       then format('model "%s" asked to wait until %s', blocked.name, date_trunc('second', blocked.blocked_until))
                   when progress.last_at < pgharness.clock() - make_interval(secs => patience.seconds) then 'nothing succeeded or failed for longer than a call may take'
              end as problem,
              case when staff.unserved = 'task' then 'start one where it is: pgharness worker, in the folder of its project'
                   when staff.unserved is not null then format('start one: pgharness worker --queues %s', staff.unserved)
                   when queued.job_count = 0 then format('queue it again: select pgharness.requeue_run(%s);', r.id)
                   when blocked.name is not null then 'wait, or ask its provider for a higher quota'
                   else format('read the workers'' logs and select * from pgharness.failed_items where run_id = %s; restart the workers; then select pgharness.requeue_run(%s);', r.id, r.id)
              end as remedy) as trouble
 where r.status = 'running' and trouble.problem is not null;
comment on view pgharness.stalled_work is
'One row per running run that does not get on, with why and what to do; no row when all is well.';
comment on column pgharness.stalled_work.last_progress_at is 'When an item of it last succeeded or failed, or when it was last started or resumed.';

create or replace view pgharness.outstanding_items with (security_invoker = true) as
select r.id as run_id, r.name as run, item.kind, ca.name as case_name, c.name as combination, item.overlap, item.replication,
       ru.author as rubric_author, item.grade_replication, f.next_attempt_at, item.ordinal
  from pgharness.runs as r
 cross join lateral (
       -- blocks of the plan in which all is decided are left out whole; in the others each place is looked up
       select 'note' as kind, o as ordinal, place.case_number, place.combination_number, place.overlap, place.replication,
              null::integer as rubric_number, null::integer as grade_replication
         from pgharness.run_definitions as d
        cross join lateral pgharness._open_blocks(r.id, 'note') as block
        cross join lateral generate_series(block.first, block.last) as o
        cross join lateral pgharness._note_place(d, o) as place
        where d.run_id = r.id
          and not exists (select from pgharness.notes as n where n.run_id = r.id and n.ordinal = o offset 0)
       union all
       select 'grade', o * d.grade_stride + k, place.case_number, place.combination_number, place.overlap, place.replication,
              grade.rubric_number, grade.replication
         from pgharness.run_definitions as d
        cross join lateral pgharness._open_blocks(r.id, 'grade') as block
        cross join lateral generate_series(block.first, block.last) as o
        cross join lateral pgharness._note_place(d, o) as place
         join pgharness.run_combinations as c on c.run_id = d.run_id and c.number = place.combination_number
        cross join lateral generate_series(0, c.grades_per_note - 1) as k
        cross join lateral pgharness._grade_place(c, k) as grade
        where d.run_id = r.id
          and not exists (select from pgharness.grades as g
                           where g.run_id = r.id and g.note_ordinal = o and g.rubric_number = grade.rubric_number and g.replication = grade.replication offset 0)
          and not exists (select from pgharness.failures as f
                           where f.run_id = r.id and f.kind = 'note' and f.ordinal = o and f.status = 'failed' offset 0)) as item
 -- looked up row by row: how many rows there will be is beyond the planner, and the first ones are wanted first
 cross join lateral (
       select ca.name from pgharness.run_cases as rc join pgharness.cases as ca on ca.id = rc.case_id
        where rc.run_id = r.id and rc.number = item.case_number offset 0) as ca
 cross join lateral (
       select c.name from pgharness.run_combinations as c where c.run_id = r.id and c.number = item.combination_number offset 0) as c
  left join lateral (
       select ru.author from pgharness.run_rubrics as rr join pgharness.rubrics as ru on ru.id = rr.rubric_id
        where rr.run_id = r.id and rr.case_number = item.case_number and rr.number = item.rubric_number offset 0) as ru on true
  left join lateral (
       select f.status, f.next_attempt_at from pgharness.failures as f
        where f.run_id = r.id and f.kind = item.kind and f.ordinal = item.ordinal offset 0) as f on true
 where f.status is distinct from 'failed';
comment on view pgharness.outstanding_items is
'One row per note or grade of a run that is neither done nor failed: the plan minus what is there, grades of notes to come included. It walks the whole plan: seconds for a million notes; run_progress has the counts. Example: select * from pgharness.outstanding_items where run_id = 1;';
comment on column pgharness.outstanding_items.kind is 'note or grade.';
comment on column pgharness.outstanding_items.overlap is 'The transcript overlap that the generator is given.';
comment on column pgharness.outstanding_items.replication is 'Which note of its case, combination and overlap it is, or belongs to (from 1).';
comment on column pgharness.outstanding_items.rubric_author is 'Whose rubric a grade is by; null for notes, and for grades against the target.';
comment on column pgharness.outstanding_items.grade_replication is 'Which grade of its note and rubric it is (from 1); null for notes.';
comment on column pgharness.outstanding_items.next_attempt_at is 'When it is tried again, if its last try failed.';
comment on column pgharness.outstanding_items.ordinal is 'Its number in the run''s plan.';

create or replace view pgharness.run_log with (security_invoker = true) as
select l.created_at, l.run_id, r.name as run, l.level, l.message, l.data, l.id
  from pgharness.logs as l
  left join pgharness.runs as r on r.id = l.run_id;
comment on view pgharness.run_log is
'One row per line of the log: changes of a run''s state and by whom, work put back, and what log() was given. Example: select * from pgharness.run_log where run_id = 1 order by id;';
comment on column pgharness.run_log.run_id is 'Null for a line of the harness itself.';
comment on column pgharness.run_log.level is 'debug, info, warning or error.';
