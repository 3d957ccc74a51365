-- Reports: who asks for one, which worker makes it, and where its files are.

create or replace function pgharness._announce_report() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    perform pg_notify('pgharness', jsonb_build_object('event', 'report.' || new.status, 'report_id', new.id, 'run_ids', new.run_ids[1:20],
                                                      'status', new.status, 'error', left(new.error, 500), 'at', clock())::text);
    return null;
end;
$$;
comment on function pgharness._announce_report() is
'NOTIFY channel pgharness of every change of a report''s state. Payload: event (report.pending, report.running, report.succeeded, report.failed), report_id, run_ids, status, error, at.';
create or replace trigger _900_announce_insert after insert on pgharness.reports
    for each row execute function pgharness._announce_report();
create or replace trigger _900_announce_update after update of status on pgharness.reports
    for each row when (old.status <> new.status) execute function pgharness._announce_report();

create or replace function pgharness.request_report(
    run text, formats text[] default '{html,md}', compared_with text[] default '{}', alpha double precision default 0.05, anew boolean default false
) returns pgharness.reports
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_known   constant text[] := '{html,md,latex,ipynb,json,csv}';
    v_run_ids bigint[];
    v_wrong   text;
    v_digest  text;
    v_report  reports;
begin
    select array_agg(named.id order by named.place) into v_run_ids
      from (select _run_id(r) as id, min(place) as place
              from unnest(array[request_report.run] || coalesce(request_report.compared_with, '{}')) with ordinality as given (r, place) group by 1) as named;
    v_wrong := (select f from unnest(request_report.formats) as f where f is null or f <> all (v_known) limit 1);
    if coalesce(cardinality(request_report.formats), 0) = 0 or v_wrong is not null or array_position(request_report.formats, null) is not null then
        raise exception 'there is no format %', coalesce('"' || left(v_wrong, 100) || '"', 'given')
            using errcode = 'PH002', hint = format('Give some of %s: formats => ''{html,md}''.', array_to_string(v_known, ', '));
    elsif request_report.alpha is null or request_report.alpha not between 0.0001 and 0.5 then
        raise exception 'alpha is %', coalesce(request_report.alpha::text, 'null') using errcode = 'PH002', hint = 'Give a number from 0.0001 to 0.5.';
    end if;
    v_digest := analysis_digest(v_run_ids);
    -- two who ask for the same at once: the second waits here for the first
    perform pg_advisory_xact_lock(hashtextextended('pgharness.request_report ' || v_digest, 0));
    if not request_report.anew then
        select r.* into v_report from reports as r
         where r.inputs_digest = v_digest and r.run_ids = v_run_ids and r.formats = request_report.formats and r.alpha = request_report.alpha
           and (r.status in ('pending', 'running')
                or r.status = 'succeeded' and _is_report_current(r)
                   and (r.version in (select w.version from workers as w where w.status = 'running')
                        or not exists (select from workers as w where w.status = 'running')))
         order by r.id desc limit 1;
        if found then
            return v_report;
        end if;
    end if;
    insert into reports (run_ids, formats, alpha, inputs_digest, requested_at)
    values (v_run_ids, request_report.formats, request_report.alpha, v_digest, clock()) returning * into v_report;
    return v_report;
end;
$$;
comment on function pgharness.request_report(text, text[], text[], double precision, boolean) is
'Ask for a report on a run, given by name or id, or on several that are compared; a worker makes it, and report_files has its files. formats are of html, md, latex, ipynb, json, csv. Idempotent: one that was made of the same ended runs by the same version, or is being made, is returned as it is, unless anew. Raises PH001, PH002. Example: select id, status from pgharness.request_report(''triage-v2/1'', formats => ''{html,md}'');';

create or replace function pgharness._is_report_current(report pgharness.reports) returns boolean
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select not exists (select from runs as r where r.id = any (report.run_ids) and (r.finished_at is null or r.finished_at >= report.started_at))
       and not exists (select from analyses as a where a.run_ids && report.run_ids and a.finished_at >= report.started_at)
       and not exists (select from preregistrations as p join runs as r on r.instance_id = p.instance_id
                        where r.id = any (report.run_ids) and p.created_at >= report.started_at);
$$;
comment on function pgharness._is_report_current(pgharness.reports) is
'Whether nothing that a report says besides scores can have changed since it was begun: its runs had ended, and nobody analysed them or registered a plan after that.';

create or replace function pgharness.request_report(
    run_id bigint, formats text[] default '{html,md}', compared_with text[] default '{}', alpha double precision default 0.05, anew boolean default false
) returns pgharness.reports
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$
    select request_report(request_report.run_id::text, formats => request_report.formats, compared_with => request_report.compared_with,
                          alpha => request_report.alpha, anew => request_report.anew);
$$;
comment on function pgharness.request_report(bigint, text[], text[], double precision, boolean) is 'request_report() on a run given by id. Example: select id from pgharness.request_report(1);';

drop function if exists pgharness.take_report(bigint);
create or replace function pgharness.take_report(worker_id bigint, report_id bigint default null) returns setof pgharness.reports
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_most constant integer := 5;
begin
    update reports as r
       set status = 'failed', error = format('its worker died %s times while it was made, the last time at %s', r.attempts, r.started_at), finished_at = clock(),
           hint = 'See the worker''s log: it may lack memory. Then ask for it again.'
     where r.status = 'running' and r.attempts >= v_most and _is_gone(r.worker_id) and not _has_stopped(r.worker_id);
    return query
    update reports as r
       set status = 'running', worker_id = take_report.worker_id, started_at = clock(),
           attempts = r.attempts + (not _has_stopped(r.worker_id))::integer
     where r.id = (select o.id from reports as o
                    where (o.status = 'pending' or o.status = 'running' and _is_gone(o.worker_id))
                      and (take_report.report_id is null or o.id = take_report.report_id)
                    order by o.id limit 1 for update skip locked)
    returning r.*;
end;
$$;
comment on function pgharness.take_report(bigint, bigint) is
'For workers: take a report that nobody makes (or the one named, if nobody makes it): one that is pending, or whose worker died; no row when there is none. One that five workers died of is failed. Example: select * from pgharness.take_report(1);';

create or replace function pgharness.finish_report(report_id bigint, worker_id bigint, title text, version text, files jsonb) returns boolean
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    update reports as r set status = 'succeeded', title = finish_report.title, version = finish_report.version, finished_at = clock()
     where r.id = finish_report.report_id and r.worker_id = finish_report.worker_id and r.status = 'running';
    if not found then
        return false;
    end if;
    insert into report_contents (report_id, path, media_type, digest, content)
    select finish_report.report_id, f.path, f.media_type, encode(sha256(decode(f.content, 'base64')), 'hex'), decode(f.content, 'base64')
      from jsonb_to_recordset(finish_report.files) as f (path text, media_type text, content text);
    return true;
end;
$$;
comment on function pgharness.finish_report(bigint, bigint, text, text, jsonb) is
'For workers: keep the files of a report, a list of {"path", "media_type", "content"} with the content in base64. False when it is another worker''s by now. Example: select pgharness.finish_report(1, 1, ''Report'', ''0.1.0'', ''[]'');';

create or replace function pgharness.fail_report(report_id bigint, worker_id bigint, error text, hint text default null) returns boolean
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    update reports as r set status = 'failed', error = fail_report.error, hint = fail_report.hint, finished_at = clock()
     where r.id = fail_report.report_id and r.worker_id = fail_report.worker_id and r.status = 'running';
    return found;
end;
$$;
comment on function pgharness.fail_report(bigint, bigint, text, text) is
'For workers: say why a report cannot be made, and what to type next. False when it is another worker''s by now. Example: select pgharness.fail_report(1, 1, ''run 1 is archived'');';
