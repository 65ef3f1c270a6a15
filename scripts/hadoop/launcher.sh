#!/bin/sh
# Stands as bin/hadoop, bin/hdfs, bin/mapred and bin/yarn of a minicluster: the commands of a Hadoop installation that
# clients call. Which one it is it tells by its own name.
home=$(cd "$(dirname "$0")/.." && pwd)
export HADOOP_HOME="$home"
export HADOOP_CONF_DIR="${HADOOP_CONF_DIR:-$home/conf}"
command="$(basename "$0") $1"
[ $# -gt 0 ] && shift
case $command in
    "hadoop jar" | "yarn jar") class=org.apache.hadoop.util.RunJar ;;
    "hadoop fs" | "hdfs dfs") class=org.apache.hadoop.fs.FsShell ;;
    "hadoop version" | "hdfs version" | "yarn version" | "mapred version") class=org.apache.hadoop.util.VersionInfo ;;
    "hdfs dfsadmin") class=org.apache.hadoop.hdfs.tools.DFSAdmin ;;
    "hdfs fsck") class=org.apache.hadoop.hdfs.tools.DFSck ;;
    "hdfs getconf") class=org.apache.hadoop.hdfs.tools.GetConf ;;
    "mapred job") class=org.apache.hadoop.mapred.JobClient ;;
    "mapred streaming") class=org.apache.hadoop.streaming.HadoopStreaming ;;
    "yarn application" | "yarn app") class=org.apache.hadoop.yarn.client.cli.ApplicationCLI; set -- application "$@" ;;
    "yarn node") class=org.apache.hadoop.yarn.client.cli.NodeCLI ;;
    "yarn logs") class=org.apache.hadoop.yarn.client.cli.LogsCLI ;;
    *)
        echo "$0: '$command' is not among what this minicluster's client can do (see scripts/hadoop/launcher.sh)." >&2
        exit 2
        ;;
esac
# shellcheck disable=SC2086  # options are meant to be split
exec "${JAVA_HOME:+$JAVA_HOME/bin/}java" "@$home/conf/archive.args" -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
    --add-opens=java.base/java.lang=ALL-UNNAMED $HADOOP_CLIENT_OPTS \
    -cp "$(cat "$home/conf/jars"):$HADOOP_CONF_DIR${HADOOP_CLASSPATH:+:$HADOOP_CLASSPATH}" \
    "$class" "$@"
