-- Analyses: what statistics read of runs, who asks for one, and what a worker found.

create or replace function pgharness.score_plan(run_id bigint) returns jsonb
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run  runs;
    v_plan run_definitions;
begin
    select * into v_run from runs as r where r.id = score_plan.run_id;
    perform _check_id('run', score_plan.run_id, v_run.name);
    select * into v_plan from run_definitions as d where d.run_id = v_run.id;
    return jsonb_build_object(
        'run_id', v_run.id, 'run', v_run.name, 'status', v_run.status, 'config', coalesce(nullif(v_plan.definition -> 'config', 'null'), '{}'),
        'overlaps', to_jsonb(coalesce(v_plan.transcript_overlaps, '{}')), 'notes_succeeded', v_run.notes_succeeded,
        'note_cost_usd', v_run.note_cost_usd, 'grade_cost_usd', v_run.grade_cost_usd,
        'archive', (select a.file_name from archives as a where a.run_id = v_run.id and a.restored_at is null))
        || (select jsonb_build_object('case_ids', coalesce(jsonb_agg(c.id order by rc.number), '[]'), 'cases', coalesce(jsonb_agg(c.name order by rc.number), '[]'))
              from run_cases as rc join cases as c on c.id = rc.case_id where rc.run_id = v_run.id)
        || (select jsonb_build_object('combinations', coalesce(jsonb_agg(jsonb_build_object(
                       'name', c.name, 'generator', c.generator ->> 'name', 'grader', c.grader ->> 'name',
                       'parameters', coalesce(c.generator -> 'parameters', '{}')) order by c.number), '[]'))
              from run_combinations as c where c.run_id = v_run.id)
        || (select jsonb_build_object('rubric_cases', coalesce(jsonb_agg(rr.case_number order by rr.case_number, rr.number), '[]'),
                                      'rubric_numbers', coalesce(jsonb_agg(rr.number order by rr.case_number, rr.number), '[]'),
                                      'rubric_authors', coalesce(jsonb_agg(ru.author order by rr.case_number, rr.number), '[]'))
              from run_rubrics as rr join rubrics as ru on ru.id = rr.rubric_id where rr.run_id = v_run.id);
end;
$$;
comment on function pgharness.score_plan(bigint) is
'What the numbers in a run''s grades stand for: its cases, combinations, rubric authors and overlaps in the order of their numbers, with its config and what it cost. Raises PH001. Example: select pgharness.score_plan(7);';

create or replace function pgharness._student_t(df bigint) returns double precision
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$
    select case when df between 1 and 20
                then ('{12.7062047362, 4.3026527297, 3.1824463053, 2.7764451052, 2.5705818356, 2.4469118511, 2.3646242516, 2.3060041352, 2.2621571628, 2.2281388520, 2.2009851601, 2.1788128297, 2.1603686565, 2.1447866879, 2.1314495456, 2.1199052992, 2.1098155778, 2.1009220402, 2.0930240544, 2.0859634473}'::double precision[])[df::integer]
                when df > 20
                then 1.959963984540054 + 2.372271230298562 / df + 2.8224986157396112 / df ^ 2 + 2.555849679507722 / df ^ 3 + 1.5895340533938225 / df ^ 4 end;
$$;
comment on function pgharness._student_t(bigint) is
'The 97.5% quantile of Student''s t, for 95% intervals: from a table up to 20 degrees of freedom, then by the Cornish-Fisher expansion (Abramowitz and Stegun 1964, 26.7.5), within 0.000001. Null for none.';

create or replace function pgharness._case_scores(run_id bigint)
    returns table (combination_number integer, case_number integer, note_count bigint, grade_count bigint, mean_score double precision)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_plan run_definitions;
begin
    select * into v_plan from run_definitions as d where d.run_id = _case_scores.run_id;
    return query
    select place.combination_number, place.case_number, sum(s.scored_count)::bigint, sum(s.grade_count)::bigint, sum(s.total) / sum(s.scored_count)::double precision
      from _note_sums(_case_scores.run_id) as s
     cross join lateral _note_place(v_plan, s.cell) as place
     where s.scored_count > 0
     group by place.combination_number, place.case_number;
end;
$$;
comment on function pgharness._case_scores(bigint) is
'Of a run, the mean score of each combination at each case: of the case''s graded notes, each the mean of its grades.';

create or replace function pgharness.paired_run_differences(run_a text, run_b text)
    returns table (combination_a text, combination_b text, case_count bigint, mean_difference double precision, standard_error double precision,
                   confidence_low double precision, confidence_high double precision)
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    with a as materialized (
        select c.number, c.name, rc.case_id, s.mean_score
          from _case_scores(_run_id(paired_run_differences.run_a)) as s
          join run_combinations as c on c.run_id = _run_id(paired_run_differences.run_a) and c.number = s.combination_number
          join run_cases as rc on rc.run_id = c.run_id and rc.number = s.case_number
    ), b as materialized (
        select c.number, c.name, rc.case_id, s.mean_score
          from _case_scores(_run_id(paired_run_differences.run_b)) as s
          join run_combinations as c on c.run_id = _run_id(paired_run_differences.run_b) and c.number = s.combination_number
          join run_cases as rc on rc.run_id = c.run_id and rc.number = s.case_number
    ), pair as (
        select a.name as combination_a, b.name as combination_b, min(a.number) as number_a, min(b.number) as number_b, count(*) as case_count,
               avg(a.mean_score - b.mean_score) as difference, stddev_samp(a.mean_score - b.mean_score) / sqrt(count(*)::double precision) as standard_error
          from a join b on b.case_id = a.case_id
         group by a.name, b.name
    )
    select p.combination_a, p.combination_b, p.case_count, p.difference, p.standard_error,
           p.difference - _student_t(p.case_count - 1) * p.standard_error, p.difference + _student_t(p.case_count - 1) * p.standard_error
      from pair as p order by p.combination_a <> p.combination_b, p.number_a, p.number_b;
$$;
comment on function pgharness.paired_run_differences(text, text) is
'One row per combination of one run and combination of another (those of the same name first): the mean difference a - b of their scores on the cases that both runs have, with its standard error over cases and its 95% interval, as in paired_differences. Runs are given by name or id. Raises PH001. Example: select * from pgharness.paired_run_differences(''triage-v2/1'', ''triage-v2/2'');';

-- who asks, and what comes of it

create or replace function pgharness._analysis_options()
    returns table (kind text, option text, type text, allowed text[], low double precision, high double precision, is_required boolean)
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select k.kind, o.option, o.type, o.allowed, o.low, o.high, o.option = any (k.required)
      from (values ('compare', '{by,alpha,correction,baseline,test,outcome,seed}'::text[], '{}'::text[]),
                   ('ablation', '{by,alpha,correction,baseline,test,outcome,seed}', '{baseline}'),
                   ('sweep', '{parameter,alpha,correction}', '{parameter}'),
                   ('agreement', '{between,scale,alpha,seed}', '{}'),
                   ('power', '{by,alpha,power,baseline,difference,note_usd,grade_usd,case_usd}', '{}')) as k (kind, options, required)
      join (values ('by', 'text', '{combination,run}'::text[], null::double precision, null::double precision),
                   ('alpha', 'number', null, 0.0001, 0.5),
                   ('correction', 'text', '{bonferroni,holm,hochberg,bh,by}', null, null),
                   ('baseline', 'text', null, null, null),
                   ('test', 'text', '{auto,t,wilcoxon,sign,permutation,mcnemar}', null, null),
                   ('outcome', 'text', '{binary,ordinal,continuous}', null, null),
                   ('seed', 'integer', null, 0, 2147483647),
                   ('parameter', 'text', null, null, null),
                   ('between', 'text', '{author,grader,replication,run}', null, null),
                   ('scale', 'text', '{binary,ordinal,continuous}', null, null),
                   ('power', 'number', null, 0.01, 0.9999),
                   ('difference', 'number', null, 0.000001, 1),
                   ('note_usd', 'number', null, 0, 1000000), ('grade_usd', 'number', null, 0, 1000000), ('case_usd', 'number', null, 0, 1000000),
                   ('combinations', 'names', null, null, null), ('cases', 'names', null, null, null), ('authors', 'names', null, null, null))
           as o (option, type, allowed, low, high)
        on o.option = any (k.options || '{combinations,cases,authors}'::text[]);
$$;
comment on function pgharness._analysis_options() is
'What each kind of analysis may be told: the option, its type (names is a list of texts), the words or the range that it may have, and whether it must be given.';

create or replace function pgharness._check_analysis(kind text, run_ids bigint[], options jsonb) returns void
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_option record;
    v_name   text;
    v_known  text[];
begin
    v_known := array(select distinct o.kind from _analysis_options() as o order by 1);
    if _check_analysis.kind is null or _check_analysis.kind <> all (v_known) then
        raise exception 'there is no analysis of kind %', coalesce('"' || left(_check_analysis.kind, 100) || '"', 'null')
            using errcode = 'PH002', hint = format('It is one of %s: select pgharness.request_analysis(''compare'', runs => ''{...}'');', array_to_string(v_known, ', '));
    elsif jsonb_typeof(options) is distinct from 'object' then
        raise exception 'options are %, not an object', coalesce(jsonb_typeof(options), 'null')
            using errcode = 'PH002', hint = 'Give them as, for example, options => ''{"alpha": 0.01}''.';
    end if;
    for v_option in
        select given.key, given.value, known.option, known.type, known.allowed, known.low, known.high
          from jsonb_each(options) as given
          left join _analysis_options() as known on known.kind = _check_analysis.kind and known.option = given.key
         order by known.option is not null, given.key
    loop
        if v_option.option is null then
            raise exception '% has no option "%"', _check_analysis.kind, left(v_option.key, 100)
                using errcode = 'PH002', hint = format('It has %s.', (select string_agg(o.option, ', ' order by o.option) from _analysis_options() as o where o.kind = _check_analysis.kind));
        end if;
        perform _check_option(v_option.key, v_option.value, v_option.type, v_option.allowed, v_option.low, v_option.high);
    end loop;
    select o.option into v_name from _analysis_options() as o where o.kind = _check_analysis.kind and o.is_required and not options ? o.option;
    if found then
        raise exception '% needs the option "%"', _check_analysis.kind, v_name
            using errcode = 'PH002', hint = format('Give it: options => ''{"%s": "..."}''.', v_name);
    end if;
    v_known := array(select distinct c.name from run_combinations as c where c.run_id = any (_check_analysis.run_ids) order by 1);
    for v_name in
        select n from jsonb_array_elements_text(coalesce(options -> 'combinations', '[]')) as n
        union all
        select options ->> 'baseline' where options ? 'baseline' and options ->> 'baseline' <> all (array(select r.name from runs as r where r.id = any (_check_analysis.run_ids)))
    loop
        if v_name <> all (v_known) then
            perform _refuse_unknown('combination', v_name, v_known[1:5], 'List them: select run, combination from pgharness.combination_scores;');
        end if;
    end loop;
end;
$$;
comment on function pgharness._check_analysis(text, bigint[], jsonb) is
'Raise PH002 for a kind of analysis or an option that does not exist or cannot have its value, PH001 for a combination that these runs do not have.';

create or replace function pgharness._check_option(name text, value jsonb, type text, allowed text[], low double precision, high double precision) returns void
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_wanted text := case when type = 'names' then 'a list of names, such as ["a", "b"]' when allowed is not null then 'one of ' || array_to_string(allowed, ', ')
                          when type = 'text' then 'a text' when type = 'integer' then format('a whole number from %s to %s', low, high)
                          else format('a number from %s to %s', low, high) end;
    v_is_ok  boolean;
begin
    if type = 'names' then
        v_is_ok := jsonb_typeof(value) = 'array';
        if v_is_ok then
            v_is_ok := jsonb_array_length(value) > 0 and not exists (select from jsonb_array_elements(value) as e where jsonb_typeof(e) <> 'string');
        end if;
    elsif type = 'text' then
        v_is_ok := jsonb_typeof(value) = 'string' and (allowed is null or value #>> '{}' = any (allowed));
    else
        v_is_ok := jsonb_typeof(value) = 'number';
        if v_is_ok then
            v_is_ok := (value #>> '{}')::numeric between low::numeric and high::numeric and (type <> 'integer' or (value #>> '{}')::numeric % 1 = 0);
        end if;
    end if;
    if not v_is_ok then
        raise exception 'option "%" is %', name, left(value::text, 100) using errcode = 'PH002', hint = format('Give %s.', v_wanted);
    end if;
end;
$$;
comment on function pgharness._check_option(text, jsonb, text, text[], double precision, double precision) is 'Raise PH002 for an option whose value is not what it may be, saying what that is.';

create or replace function pgharness.analysis_digest(run_ids bigint[]) returns text
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select encode(sha256(convert_to(string_agg(jsonb_build_array(
               r.id, r.name, r.status, r.archived_at, r.notes_succeeded, r.grades_succeeded, r.note_cost_usd, r.grade_cost_usd,
               (select max(g.created_at) from grades as g where g.run_id = r.id))::text, E'\n' order by r.id), 'UTF8')), 'hex')
      from runs as r where r.id = any (analysis_digest.run_ids);
$$;
comment on function pgharness.analysis_digest(bigint[]) is
'SHA-256 over what an analysis of runs follows from: their names, states, counters, costs and last grade. Grades are only ever added, so it need not read them. Null when no such run exists. Example: select pgharness.analysis_digest(''{1,2}'');';

create or replace function pgharness._announce_analysis() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    perform pg_notify('pgharness', jsonb_build_object('event', 'analysis.' || new.status, 'analysis_id', new.id, 'kind', new.kind, 'run_ids', new.run_ids[1:20],
                                                      'status', new.status, 'error', left(new.error, 500), 'at', clock())::text);
    return null;
end;
$$;
comment on function pgharness._announce_analysis() is
'NOTIFY channel pgharness of every change of an analysis'' state. Payload: event (analysis.pending, analysis.running, analysis.succeeded, analysis.failed), analysis_id, kind, run_ids, status, error, at.';
create or replace trigger _900_announce_insert after insert on pgharness.analyses
    for each row execute function pgharness._announce_analysis();
create or replace trigger _900_announce_update after update of status on pgharness.analyses
    for each row when (old.status <> new.status) execute function pgharness._announce_analysis();

create or replace function pgharness.request_analysis(kind text, runs text[], options jsonb default '{}', anew boolean default false) returns pgharness.analyses
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run_ids  bigint[];
    v_digest   text;
    v_analysis analyses;
begin
    select array_agg(distinct id order by id) into v_run_ids from (select _run_id(r) as id from unnest(request_analysis.runs) as r) as named;
    if v_run_ids is null then
        raise exception 'no run is named' using errcode = 'PH002', hint = 'Name one or more: select pgharness.request_analysis(''compare'', runs => ''{triage-v2/1}'');';
    end if;
    perform _check_analysis(request_analysis.kind, v_run_ids, request_analysis.options);
    v_digest := analysis_digest(v_run_ids);
    -- two who ask for the same at once: the second waits here for the first
    perform pg_advisory_xact_lock(hashtextextended('pgharness.request_analysis ' || v_digest, 0));
    if not request_analysis.anew then
        select a.* into v_analysis from analyses as a
         where a.inputs_digest = v_digest and a.kind = request_analysis.kind and a.options = request_analysis.options and a.run_ids = v_run_ids
           and (a.status in ('pending', 'running')
                or a.status = 'succeeded' and (a.library_versions ->> 'pgharness' in (select w.version from workers as w where w.status = 'running')
                                               or not exists (select from workers as w where w.status = 'running')))
         order by a.id desc limit 1;
        if found then
            return v_analysis;
        end if;
    end if;
    insert into analyses (kind, run_ids, options, inputs_digest, requested_at)
    values (request_analysis.kind, v_run_ids, request_analysis.options, v_digest, clock()) returning * into v_analysis;
    return v_analysis;
end;
$$;
comment on function pgharness.request_analysis(text, text[], jsonb, boolean) is
'Ask for an analysis of runs, given by name or id, which a worker then makes: compare (combinations of a run, or several runs), ablation (each against options.baseline), sweep (a numeric options.parameter against the score), agreement, power. Idempotent: one that was made of the same grades by the same version, or is being made, is returned as it is, unless anew. Raises PH001, PH002. Example: select id, status from pgharness.request_analysis(''compare'', runs => ''{triage-v2/1}'', options => ''{"alpha": 0.01}'');';

create or replace function pgharness.request_analysis(kind text, run_ids bigint[], options jsonb default '{}', anew boolean default false) returns pgharness.analyses
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select request_analysis(request_analysis.kind, runs => request_analysis.run_ids::text[], options => request_analysis.options, anew => request_analysis.anew); $$;
comment on function pgharness.request_analysis(text, bigint[], jsonb, boolean) is 'request_analysis() of runs given by id. Example: select id from pgharness.request_analysis(''compare'', array[1, 2]);';

create or replace function pgharness.take_analysis(worker_id bigint, analysis_id bigint default null) returns setof pgharness.analyses
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_most constant integer := 5;
begin
    update analyses as a
       set status = 'failed', error = format('its worker died %s times while it was made, the last time at %s', a.attempts, a.started_at), finished_at = clock(),
           hint = 'See the worker''s log: it may lack memory. Then ask for it again.'
     where a.status = 'running' and a.attempts >= v_most and _is_gone(a.worker_id) and not _has_stopped(a.worker_id);
    return query
    update analyses as a
       set status = 'running', worker_id = take_analysis.worker_id, started_at = clock(),
           attempts = a.attempts + (not _has_stopped(a.worker_id))::integer
     where a.id = (select o.id from analyses as o
                    where (o.status = 'pending' or o.status = 'running' and _is_gone(o.worker_id))
                      and (take_analysis.analysis_id is null or o.id = take_analysis.analysis_id)
                    order by o.id limit 1 for update skip locked)
    returning a.*;
end;
$$;
comment on function pgharness.take_analysis(bigint, bigint) is
'For workers: take an analysis that nobody makes (or the one named, if nobody makes it): one that is pending, or whose worker died; no row when there is none. One that five workers died of is failed. Example: select * from pgharness.take_analysis(1);';

create or replace function pgharness.finish_analysis(analysis_id bigint, worker_id bigint, inputs_digest text, library_versions jsonb, result jsonb) returns boolean
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    update analyses as a
       set status = 'succeeded', inputs_digest = finish_analysis.inputs_digest, library_versions = finish_analysis.library_versions,
           result = finish_analysis.result, finished_at = clock()
     where a.id = finish_analysis.analysis_id and a.worker_id = finish_analysis.worker_id and a.status = 'running';
    return found;
end;
$$;
comment on function pgharness.finish_analysis(bigint, bigint, text, jsonb, jsonb) is
'For workers: keep what came of an analysis, with the digest of what was read. False when it is another worker''s by now. Example: select pgharness.finish_analysis(1, 1, ''...'', ''{}'', ''{}'');';

create or replace function pgharness.fail_analysis(analysis_id bigint, worker_id bigint, error text, hint text default null) returns boolean
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    update analyses as a set status = 'failed', error = fail_analysis.error, hint = fail_analysis.hint, finished_at = clock()
     where a.id = fail_analysis.analysis_id and a.worker_id = fail_analysis.worker_id and a.status = 'running';
    return found;
end;
$$;
comment on function pgharness.fail_analysis(bigint, bigint, text, text) is
'For workers: say why an analysis cannot be made, and what to type next. False when it is another worker''s by now. Example: select pgharness.fail_analysis(1, 1, ''there are no grades'');';
